"""Layouts of the same arrays in modules of PyTorch and flax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Name = tuple[str, str]  # collection and name in flax


@dataclasses.dataclass
class Problems:
    """Mismatches; `wrong` ones are errors, `unfit` ones only if strict."""

    strict: bool
    wrong: list[str] = dataclasses.field(default_factory=list)
    unfit: list[str] = dataclasses.field(default_factory=list)

    def has_axes(
        self,
        where: str,
        kind: str,
        name: str,
        a: np.ndarray,
        axes: tuple[int, ...],
    ) -> bool:
        if a.ndim not in axes:
            number = " or ".join(map(str, axes))
            self.wrong.append(
                f"{where}: {name!r} of a {kind} has {number} axes; got "
                f"{list(a.shape)}"
            )
        return a.ndim in axes

    def report(self) -> list[str]:
        """Returns what was left out, or raises if that is an error."""
        errors = [*self.wrong, *(self.unfit if self.strict else ())]
        if errors:
            raise ValueError("Nothing was converted:\n  " + "\n  ".join(errors))
        return self.unfit


class Leaf(NamedTuple):
    """An array with its names and layouts in both libraries."""

    torch: str
    flax: Name
    axes: tuple[int, ...] = (1,)  # numbers of axes that it may have
    to_flax: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray


def _first_two_last(a: np.ndarray) -> np.ndarray:
    return a.transpose(*range(2, a.ndim), 1, 0)


def _last_two_first(a: np.ndarray) -> np.ndarray:
    return a.transpose(-1, -2, *range(a.ndim - 2))


def _mirrored_to_flax(a: np.ndarray) -> np.ndarray:
    # PyTorch scatters each input over the window; flax slides the window over
    # the dilated input.
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
    """Returns the kind of a module of PyTorch, or None if ambiguous."""
    if {"running_mean", "running_var"} <= leaves.keys():
        return "batch_norm"
    if "weight" not in leaves or not leaves.keys() <= {"weight", "bias"}:
        return None
    return _BY_AXES.get(leaves["weight"].ndim)


def kind_in_flax(leaves: Mapping[Name, np.ndarray]) -> str | None:
    """Returns the kind of a module of flax, or None if ambiguous."""
    if {("batch_stats", "mean"), ("batch_stats", "var")} <= leaves.keys():
        return "batch_norm"
    if ("params", "scale") in leaves:
        return "norm"
    if ("params", "embedding") in leaves:
        return "embedding"
    kernel = leaves.get(("params", "kernel"))
    return None if kernel is None else _BY_AXES.get(kernel.ndim)


def module_to_flax(
    kind: str,
    leaves: Mapping[str, np.ndarray],
    size: tuple[int, ...] | None,
    problems: Problems,
    where: str,
) -> dict[Name, np.ndarray]:
    """Returns the arrays of a PyTorch module under flax's names.

    The number of batches becomes `steps`, which most layers do not have.

    Args:
      kind: kind of the module.
      leaves: arrays of the PyTorch module.
      size: shape of the running statistics, if leaves do not determine it.
      problems: records mismatches.
      where: name of the module in messages.
    """
    if kind == "same":
        return {("params", name): a for name, a in leaves.items()}
    rest, found = dict(leaves), {}
    for leaf in KINDS[kind]:
        if leaf.torch in rest:
            a = rest.pop(leaf.torch)
            if problems.has_axes(where, kind, leaf.torch, a, leaf.axes):
                found[leaf.flax] = leaf.to_flax(a)
    if (
        kind == "batch_norm"
        and not {"running_mean", "running_var"} <= leaves.keys()
    ):
        problems.wrong.append(
            f"{where}: it has no running statistics; take batch_norm_untracked"
        )
    for name in ("running_mean", "weight"):
        size = leaves[name].shape if name in leaves else size
    if kind.startswith("batch_norm"):
        steps = rest.pop("num_batches_tracked", 0)
        found["batch_stats", "steps"] = np.full(size or (), steps, np.int32)
    if kind == "batch_norm_untracked":
        if size is None:
            problems.wrong.append(
                f"{where}: neither the state dict nor like says how many "
                "channels it has"
            )
        found["batch_stats", "mean"] = np.zeros(size or (), np.float32)
        found["batch_stats", "var"] = np.ones(size or (), np.float32)
    problems.unfit += [
        f"{where}: {name!r} is no part of a {kind}" for name in rest
    ]
    return found


def module_to_torch(
    kind: str,
    leaves: Mapping[Name, np.ndarray],
    problems: Problems,
    where: str,
) -> dict[str, np.ndarray]:
    """Inverse of `module_to_flax`; without `steps`, 0 batches."""
    rest, found = dict(leaves), {}
    if kind == "same":
        found = {
            name: rest.pop((c, name)) for c, name in leaves if c == "params"
        }
    for leaf in KINDS[kind]:
        if leaf.flax in rest:
            a = rest.pop(leaf.flax)
            if problems.has_axes(where, kind, leaf.flax[1], a, leaf.axes):
                found[leaf.torch] = leaf.to_torch(a)
    if kind == "batch_norm":
        steps = rest.pop(("batch_stats", "steps"), np.zeros(1))
        found["num_batches_tracked"] = np.array(steps.max(initial=0), np.int64)
    if kind == "batch_norm_untracked":
        rest = {key: a for key, a in rest.items() if key[0] != "batch_stats"}
    problems.unfit += [
        f"{where}: {name!r} has no counterpart in a {kind}" for _, name in rest
    ]
    return found


def to_array(name: str, value: Any) -> np.ndarray:
    """Returns a numpy array, which shares memory with value if possible."""
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
    """Returns a copy that torch.from_numpy accepts."""
    if array.dtype.kind not in "biufc":
        array = array.astype(np.float32)
    return np.array(array, order="C")


def scaled(a: np.ndarray, factor: float) -> np.ndarray:
    """Returns factor * a, rounded once."""
    return (a.astype(np.float64) * factor).astype(a.dtype)
