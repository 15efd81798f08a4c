"""How a module of PyTorch and one of flax lay out the same arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Name = tuple[str, str]  # collection and name in flax


class Leaf(NamedTuple):
    """An array under both names, and the way between its layouts."""

    torch: str
    flax: Name
    axes: tuple[int, ...] = (1,)  # how many it may have
    to_flax: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray


def _first_two_last(a: np.ndarray) -> np.ndarray:
    return a.transpose(*range(2, a.ndim), 1, 0)


def _last_two_first(a: np.ndarray) -> np.ndarray:
    return a.transpose(-1, -2, *range(a.ndim - 2))


def _mirrored_to_flax(a: np.ndarray) -> np.ndarray:
    # PyTorch spreads each input over the window, flax slides the window over
    # inputs set apart.
    windows = tuple(range(2, a.ndim))
    return np.flip(a, windows).transpose(*windows, 0, 1)


def _mirrored_to_torch(a: np.ndarray) -> np.ndarray:
    a = a.transpose(-2, -1, *range(a.ndim - 2))
    return np.flip(a, tuple(range(2, a.ndim)))


_WINDOWS = (3, 4, 5)
_SCALE = Leaf("weight", ("params", "scale"))
_BIAS = Leaf("bias", ("params", "bias"))
_KERNEL = Leaf(
    "weight",
    ("params", "kernel"),
    _WINDOWS,
    _first_two_last,
    _last_two_first,
)
KINDS: dict[str, tuple[Leaf, ...]] = {
    "batch_norm": (
        _SCALE,
        _BIAS,
        Leaf("running_mean", ("batch_stats", "mean")),
        Leaf("running_var", ("batch_stats", "var")),
    ),
    "batch_norm_untracked": (_SCALE, _BIAS),
    "conv": (_KERNEL, _BIAS),
    "conv_transpose": (
        _KERNEL._replace(
            to_flax=_mirrored_to_flax, to_torch=_mirrored_to_torch
        ),
        _BIAS,
    ),
    "conv_transpose_kernel": (_KERNEL, _BIAS),
    "embedding": (Leaf("weight", ("params", "embedding"), (2,)),),
    "linear": (
        Leaf("weight", ("params", "kernel"), (2,), np.transpose, np.transpose),
        _BIAS,
    ),
    "norm": (_SCALE, _BIAS),
    "same": (),
}
_BY_AXES = {2: "linear"} | dict.fromkeys(_WINDOWS, "conv")


def kind_in_torch(leaves: Mapping[str, np.ndarray]) -> str | None:
    """Returns the kind of a module of PyTorch; None where it is open."""
    if {"running_mean", "running_var"} <= leaves.keys():
        return "batch_norm"
    if "weight" not in leaves or not leaves.keys() <= {"weight", "bias"}:
        return None
    return _BY_AXES.get(leaves["weight"].ndim)


def kind_in_flax(leaves: Mapping[Name, np.ndarray]) -> str | None:
    """Returns the kind of a module of flax; None where it is open."""
    if {("batch_stats", "mean"), ("batch_stats", "var")} <= leaves.keys():
        return "batch_norm"
    if ("params", "scale") in leaves:
        return "norm"
    if ("params", "embedding") in leaves:
        return "embedding"
    kernel = leaves.get(("params", "kernel"))
    return None if kernel is None else _BY_AXES.get(kernel.ndim)


def module_to_flax(
    kind: str, leaves: Mapping[str, np.ndarray]
) -> tuple[dict[Name, np.ndarray], list[str]]:
    """Returns the leaves of one module under flax's names, and what is wrong.

    The number of batches becomes `steps`, which most layers have no use for.
    """
    if kind == "same":
        return {("params", name): a for name, a in leaves.items()}, []
    rest, found, wrong = dict(leaves), {}, []
    for leaf in KINDS[kind]:
        if leaf.torch in rest:
            a = rest.pop(leaf.torch)
            wrong += _check(kind, leaf.torch, a, leaf.axes)
            found[leaf.flax] = a if wrong else leaf.to_flax(a)
    if (
        kind == "batch_norm"
        and not {"running_mean", "running_var"} <= leaves.keys()
    ):
        wrong.append("it has no running statistics; take batch_norm_untracked")
    size = leaves.get("running_mean", leaves.get("weight", np.zeros(0))).shape
    if kind.startswith("batch_norm"):
        steps = rest.pop("num_batches_tracked", 0)
        found["batch_stats", "steps"] = np.full(size, steps, np.int32)
    if kind == "batch_norm_untracked":
        found["batch_stats", "mean"] = np.zeros(size, np.float32)
        found["batch_stats", "var"] = np.ones(size, np.float32)
    return found, wrong + [f"{name!r} is no part of a {kind}" for name in rest]


def module_to_torch(
    kind: str, leaves: Mapping[Name, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Undoes `module_to_flax`; without `steps` the number of batches is 0."""
    rest, found, wrong = dict(leaves), {}, []
    if kind == "same":
        found = {
            name: rest.pop((c, name)) for c, name in leaves if c == "params"
        }
    for leaf in KINDS[kind]:
        if leaf.flax in rest:
            a = rest.pop(leaf.flax)
            wrong += _check(kind, leaf.flax[1], a, leaf.axes)
            found[leaf.torch] = a if wrong else leaf.to_torch(a)
    if kind == "batch_norm":
        steps = rest.pop(("batch_stats", "steps"), np.zeros(1))
        found["num_batches_tracked"] = np.array(steps.max(initial=0), np.int64)
    if kind == "batch_norm_untracked":
        rest = {key: a for key, a in rest.items() if key[0] != "batch_stats"}
    wrong += [f"{name!r} has no counterpart in a {kind}" for _, name in rest]
    return found, wrong


def _check(
    kind: str, name: str, a: np.ndarray, axes: tuple[int, ...]
) -> list[str]:
    if a.ndim in axes:
        return []
    number = " or ".join(map(str, axes))
    return [f"{name!r} of a {kind} has {number} axes; got {list(a.shape)}"]


def to_array(name: str, value: Any) -> np.ndarray:
    """Returns a numpy array, over the memory of value where it can."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except TypeError:  # a dtype that numpy lacks, such as torch.bfloat16
        dtype = jnp.dtype(str(value.dtype).rpartition(".")[2])
        array = np.asarray(value.float()).astype(dtype)
    if array.dtype.kind in "OSU":
        raise ValueError(
            f"{name!r} must be an array; got {type(value).__name__}. Of a "
            "checkpoint with several entries give the state dict alone."
        )
    return array


def for_torch(array: np.ndarray) -> np.ndarray:
    """Returns a copy that torch.from_numpy takes."""
    if array.dtype.kind not in "biufc":
        array = array.astype(np.float32)
    return np.array(array, order="C")
