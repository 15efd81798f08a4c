"""Norm layers by name, and the devices they synchronize over."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

import jaxbn
from jaxbn.linen import BatchNorm
from train import UserError
from train.topology import MICROBATCH_AXIS, Topology


class Affine(nn.Module):
    """Batch norm without the normalization: only scale and bias."""

    use_running_average: bool | None = None
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1:]
        scale = self.param("scale", self.scale_init, size)
        bias = self.param("bias", self.bias_init, size)
        return (x * scale + bias).astype(self.dtype or x.dtype)


NORMS = {"jaxbn": BatchNorm, "flax": nn.BatchNorm, "none": Affine}

# Presets of layer options.
VARIANTS = {
    "renorm": {"renorm": jaxbn.renorm_limits},
    "ghost": {"normalize_over": 32},
    "debiased": {"debias": True},
}

# Config fields that belong to an option group of the layer.
_GROUPED = {
    "normalize_over": ("sharing", jaxbn.Scope),
    "debias": ("running", jaxbn.Running),
    "ddof": ("running", jaxbn.Running),
    "mode": ("running", jaxbn.Running),
    "skip_nonfinite": ("running", jaxbn.Running),
}


def make_norm(
    config: ConfigDict, topology: Topology, *, microbatches: int = 1
) -> Callable[..., nn.Module]:
    """Returns a function (use_running_average, dtype, scale_init) -> layer.

    Args:
      config: config of the run.
      topology: devices of the run.
      microbatches: above 1, the layer also synchronizes over microbatches.

    Raises:
      UserError: norm or norm_axes is unknown, norm_options sets an unknown
        field, or the options are invalid or do not fit the batch.
    """
    known = sorted({*NORMS, *VARIANTS})
    if config.norm not in known:
        raise UserError(
            f"norm={config.norm!r} is unknown; choose from {', '.join(known)}."
        )
    given = {
        name: value
        for name, value in config.norm_options.items()
        if value is not None
    }
    if config.norm in ("none", "flax"):
        _check_no_options(given, config.norm)
    if config.norm == "none":
        return Affine
    own = {"momentum": config.norm_momentum, "epsilon": config.norm_epsilon}
    if config.norm == "flax":
        own |= _flax_axes(config, topology, microbatches)
        return functools.partial(nn.BatchNorm, **own)
    own |= _jaxbn_axes(config, topology, microbatches)
    _check_options(config, given, own)
    options = {**VARIANTS.get(config.norm, {}), **given}
    try:
        layer = functools.partial(BatchNorm, **own, **_grouped(options))
        _check_layer(layer, config, topology, microbatches)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"norm={config.norm!r}: {reason}") from error
    return layer


def _check_options(
    config: ConfigDict, given: dict[str, Any], own: dict[str, Any]
) -> None:
    """Raises UserError for options that config does not leave open.

    Args:
      config: config of the run.
      given: options of the layer.
      own: fields of the layer that other fields of the config set.
    """
    size = {**VARIANTS.get(config.norm, {}), **given}.get("normalize_over")
    if size is not None and config.norm_axes != "all":
        raise UserError(
            f"norm_axes={config.norm_axes!r} and normalize_over={size} both "
            "choose the examples that share statistics; set norm_axes='all' "
            "or another norm."
        )
    for name in given:
        if name not in (*_GROUPED, *BatchNorm.__dataclass_fields__):
            raise UserError(
                f"norm_options.{name} is not an option of "
                "jaxbn.linen.BatchNorm."
            )
        if name in own:
            raise UserError(
                f"norm_options.{name} must not be set; use norm_momentum, "
                "norm_epsilon and norm_axes."
            )


def _grouped(options: dict[str, Any]) -> dict[str, Any]:
    """Converts flat options to fields of the layer."""
    fields: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name, value in options.items():
        field, kind = _GROUPED.get(name, (None, None))
        if field is None:
            fields[name] = value
        else:
            groups.setdefault(field, (kind, {}))[1][name] = value
    return fields | {f: kind(**given) for f, (kind, given) in groups.items()}


def _check_layer(
    layer: Callable[..., nn.Module],
    config: ConfigDict,
    topology: Topology,
    microbatches: int,
) -> None:
    """Raises the layer's errors about its options and the training batch."""
    # The order of devices on the mesh does not matter here.
    norm = layer(use_running_average=False, axis_name="device")
    if norm.sharing.normalize_over is None:
        return  # no other option depends on the batch
    if microbatches != config.get("microbatches", 1):
        return  # not the layer of the training step

    def train(x: jax.Array) -> jax.Array:
        variables = norm.init(jax.random.key(0), x)
        y, _ = norm.apply(variables, x, mutable=["batch_stats"])
        return y

    devices = topology.mesh.size * microbatches
    # Two pixels: statistics of one example are defined for images.
    shape = (devices, config.batch_size // devices, 2, 1)
    jax.eval_shape(
        jax.vmap(train, axis_name=norm.axis_name),
        jax.ShapeDtypeStruct(shape, "float32"),
    )


def describe_statistics(config: ConfigDict, topology: Topology) -> str:
    """Describes how many examples share statistics."""
    if config.norm == "none":
        return "nothing normalized"
    size, devices = config.batch_size, topology.mesh.size
    over = config.norm_options.normalize_over
    if config.norm == "ghost" and over is None:
        over = VARIANTS["ghost"]["normalize_over"]
    if over is None:
        over = size * _num_sharing(config, topology) // devices
    return f"statistics over {over} examples"


def _num_sharing(config: ConfigDict, topology: Topology) -> int:
    """Returns the number of devices that share statistics."""
    names = _axes(config, topology)
    return math.prod(topology.mesh.shape[name] for name in names)


def _axes(config: ConfigDict, topology: Topology) -> tuple[str, ...]:
    if config.norm_axes == "all":
        return topology.axes
    if config.norm_axes == "none":
        return ()
    names = topology.mesh.axis_names
    if config.norm_axes not in names:
        known = ("all", "none", *names)
        raise UserError(
            f"norm_axes={config.norm_axes!r} must be one of "
            f"{', '.join(known)} with mesh={config.mesh!r}."
        )
    return (config.norm_axes,) if topology.axes else ()


def _batch_axes(topology: Topology, microbatches: int) -> tuple[str, ...]:
    """Returns all axes of the batch; microbatches come last."""
    return (
        (*topology.axes, MICROBATCH_AXIS) if microbatches > 1 else topology.axes
    )


def _jaxbn_axes(
    config: ConfigDict, topology: Topology, microbatches: int
) -> dict[str, Any]:
    """Returns axis and groups; running statistics cover all examples."""
    names, bound = _axes(config, topology), _batch_axes(topology, microbatches)
    if names == topology.axes:
        return {"axis_name": bound or None}
    if not names:
        together = jaxbn.Scope(group_size=microbatches)
        return {"axis_name": bound, "sharing": together}
    # Device indices along all axes, one row per group.
    shape = (*topology.mesh.devices.shape, microbatches)
    numbers = np.arange(topology.mesh.size * microbatches).reshape(shape)
    along = np.moveaxis(numbers, topology.axes.index(names[0]), -2)
    groups = along.reshape(-1, topology.mesh.shape[names[0]] * microbatches)
    return {
        "axis_name": bound,
        "axis_index_groups": tuple(map(tuple, groups.tolist())),
    }


def _flax_axes(
    config: ConfigDict, topology: Topology, microbatches: int
) -> dict[str, Any]:
    if config.norm_axes != "all":
        raise UserError(
            f"norm_axes={config.norm_axes!r} would make flax's running "
            "statistics differ between devices; norm='flax' requires 'all'."
        )
    return {"axis_name": _batch_axes(topology, microbatches) or None}


def _check_no_options(given: dict[str, Any], norm: str) -> None:
    if given:
        name, value = next(iter(given.items()))
        raise UserError(
            f"norm_options.{name}={value!r} is an option of jaxbn's layer, "
            f"but norm is {norm!r}."
        )
