"""Converts options of a PyTorch batch norm to fields of flax's, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import flax.linen as nn

from jaxbn._options import Running
from jaxbn.linen import BatchNorm


def options_from_torch(
    module: Any, *, axis_name: Hashable | None = None
) -> dict[str, Any]:
    """Returns the fields of BatchNorm for a batch norm module of PyTorch.

    In PyTorch, momentum is the weight of the new value, so it becomes 1 -
    momentum. momentum=None, the plain average over all batches, stays None,
    which jaxbn supports and flax does not. To go on storing unbiased running
    variances, as PyTorch does, add running=jaxbn.Running(ddof=1), a field of
    jaxbn.

    Args:
      module: a torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, or any object
        with momentum, eps, affine and track_running_stats.
      axis_name: mesh axis to synchronize over; required for SyncBatchNorm.

    Returns:
      dict of momentum, epsilon, use_scale and use_bias; axis_name if given;
      use_running_average=False if running statistics are not tracked, in which
      case the call must not pass it.

    Raises:
      ValueError: module is a SyncBatchNorm and axis_name is None; module has
        its own process group; module is an InstanceNorm; or an attribute is
        missing.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    needed = ("momentum", "eps", "affine", "track_running_stats")
    missing = [name for name in needed if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"{type(module).__name__} is no batch norm of PyTorch: it has no "
            f"{', '.join(missing)}."
        )
    if any("InstanceNorm" in name for name in names):
        raise ValueError(
            f"{type(module).__name__} takes the statistics of every example "
            "alone; flax.linen.InstanceNorm does that, no batch norm."
        )
    if "SyncBatchNorm" in names and axis_name is None:
        raise ValueError(
            "SyncBatchNorm takes its statistics over all processes. Give the "
            'mesh axis that the batch is split over, such as axis_name="data".'
        )
    if getattr(module, "process_group", None) is not None:
        raise ValueError(
            "This SyncBatchNorm has a process group of its own, which says "
            "nothing of a mesh. Set process_group to None, and sharing of "
            "jaxbn's layer to Scope(group_size=n), for n processes in a group."
        )
    momentum = module.momentum
    affine = bool(module.affine)
    options = {
        "momentum": None if momentum is None else _other(momentum),
        "epsilon": module.eps,
        "use_scale": affine,
        "use_bias": affine and getattr(module, "bias", True) is not None,
    }
    if axis_name is not None:
        options["axis_name"] = axis_name
    if not module.track_running_stats:
        options["use_running_average"] = False
    return options


def options_to_torch(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a PyTorch batch norm for fields of BatchNorm.

    Use them as torch.nn.BatchNorm2d(channels, **options), or with SyncBatchNorm
    if the fields include axis_name, for which PyTorch has no option. PyTorch's
    running variance is always unbiased, whatever ddof is.

    Args:
      fields: fields of flax's or jaxbn's BatchNorm by name; missing ones have
        their defaults. `dataclasses.asdict` returns those of a linen layer.

    Returns:
      dict of momentum, eps, affine and track_running_stats, and of bias=False
      for a layer with scale but without bias.

    Raises:
      ValueError: a field is unknown, or PyTorch has no counterpart of it.
    """
    known = {f.name: f.default for f in dataclasses.fields(BatchNorm)}
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"BatchNorm has no field {', '.join(unknown)}.")
    shared = {field.name for field in dataclasses.fields(nn.BatchNorm)}
    for name, value in fields.items():
        if name == "running":
            # PyTorch's is unbiased whatever ddof says.
            value = dataclasses.replace(value, ddof=Running().ddof)
        ignored = name in shared - {"axis_index_groups"}
        if not ignored and value != known[name]:
            raise ValueError(f"PyTorch has nothing like {name}={value!r}.")
    given = {**known, **fields}
    if given["use_bias"] and not given["use_scale"]:
        raise ValueError("PyTorch has no batch norm with bias but no weight.")
    momentum = given["momentum"]
    options = {
        "momentum": None if momentum is None else _other(momentum),
        "eps": given["epsilon"],
        "affine": given["use_scale"],
        "track_running_stats": given["use_running_average"] is not False,
    }
    if given["use_scale"] and not given["use_bias"]:
        options["bias"] = False
    return options


def _other(momentum: float) -> float:
    return round(1 - momentum, 12)  # 0.1, not 0.09999999999999998
