"""Finds copies of flax's BatchNorm under other names, by running them.

Fields and variables are not enough: a batch norm with mean absolute deviations,
or with corrections, may have the same ones. So a layer with the fields of
flax's layer is compared with it on a batch, and converted only if the results
agree.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.convert._layers import SHARED, fields_of, written_class
from jaxbn.convert._trial import (
    difference,
    run_apart,
    weights,
)

# Arguments and fields that select the mode, and whether True means training.
_MODES = {
    "use_running_average": False,
    "deterministic": False,
    "train": True,
    "training": True,
    "is_training": True,
}
_LARGEST = 256  # examples in a trial


class Reading(NamedTuple):
    """Fields of flax's layer for a copy of it, and arguments of its call."""

    fields: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Mode(NamedTuple):
    name: str | None  # an argument of the call; None: use_running_average
    inverse: bool


def looks_like_flax(cls: type[nn.Module]) -> bool:
    names = {field.name for field in dataclasses.fields(cls)}
    return {"momentum", "epsilon"} <= names


def read(layer: nn.Module, args: Any, kwargs: Any) -> Reading | str:
    """Returns the fields and arguments of a copy, or why it is none."""
    cls = written_class(layer)
    signature = inspect.signature(cls.__call__)
    bound = signature.bind(layer, *args, **kwargs)
    bound.apply_defaults()
    (_, _), *given = bound.arguments.items()
    if not given or not hasattr(given[0][1], "shape"):
        return "which is not called with an array first"
    (_, x), *rest = given
    passed: dict[str, Any] = {}
    mode = None
    for name, value in rest:
        if name in _MODES and mode is None:
            if isinstance(value, jax.Array):
                return f"whose {name} is an array"
            mode = _Mode(name, _MODES[name])
            turned = mode.inverse and value is not None
            passed["use_running_average"] = not value if turned else value
        elif name == "mask":
            passed["mask"] = value
        elif value is not None and value != () and value != {}:
            return f"which is called with {name}, as flax's layer is not"
    fields = fields_of(layer, cls)
    if mode is None:
        if "use_running_average" not in fields:
            return "which is not told what is training"
        mode = _Mode(None, False)
    why = _verdict(cls, fields, mode, x.shape)
    if why is not None:
        return why
    shared = {name: fields[name] for name in fields if name in SHARED}
    return Reading(shared, (x,), passed)


def _verdict(
    cls: type[nn.Module], fields: dict[str, Any], mode: _Mode, shape: Any
) -> str | None:
    """Returns why a layer is not a copy of flax's, or None if it is one."""
    axis = fields.get("axis", -1)
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    features = {a % len(shape) for a in axes}
    # A trial runs on one device, and does not need the initializers.
    fields = {
        name: None if name in ("axis_name", "axis_index_groups") else value
        for name, value in fields.items()
        if name != "use_running_average"
    } | {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.name.endswith("_init")
        and field.default is not dataclasses.MISSING
    }
    # As many examples as the batch has: ghost batches of 32 are a single one
    # in a smaller batch.
    examples = 0 if 0 in features else _size(shape[0], _LARGEST)
    small = tuple(_size(d, 3) for d in shape)
    full = tuple(
        _size(d, d) if i in features else n
        for i, (d, n) in enumerate(zip(shape, small))
    )
    why = None
    for sizes in dict.fromkeys((small, full)):  # a field may say the size
        if examples:
            sizes = (examples, *sizes[1:])
        trial = functools.partial(_trial, cls, fields, mode, sizes)
        key = (cls, *sorted(fields.items(), key=str), mode, sizes)
        why = run_apart(trial, key=key)
        if why is None:
            break
    return why


def _size(size: Any, largest: int) -> int:
    try:
        return min(max(int(size), 2), largest)
    except Exception:  # of jax.export, where it has no number yet
        return largest


def _trial(
    cls: type[nn.Module],
    fields: dict[str, Any],
    mode: _Mode,
    shape: tuple[int, ...],
) -> str | None:
    flaxs = {name: fields[name] for name in fields if name in SHARED}

    def run(own: bool, variables: Any, x: Any, inference: bool) -> Any:
        passed: dict[str, Any] = {}
        given = dict(fields if own else flaxs)
        if own and mode.name is not None:
            passed[mode.name] = inference != mode.inverse
            inference = None  # type: ignore[assignment]
        if not own or _has_field(cls, "use_running_average"):
            given["use_running_average"] = inference
        layer = (cls if own else nn.BatchNorm)(**given, parent=None)
        if variables is None:
            return layer.init(jax.random.key(0), x, **passed)
        return layer.apply(variables, x, **passed, mutable=["batch_stats"])

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    theirs, like = (
        jax.eval_shape(lambda x, own=own: run(own, None, x, False), x)
        for own in (True, False)
    )
    more = sorted(_names(theirs) - _names(like))
    less = sorted(_names(like) - _names(theirs))
    if more or less:
        found, missing = ", ".join(more), ", ".join(less)
        return " and ".join(
            [f"which has {found}, and flax's layer has not"] * bool(more)
            + [f"which lacks {missing}"] * bool(less)
        )
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda a: rng.uniform(0.5, 2, a.shape).astype(a.dtype), like
    )

    def results(x: Any, *, own: bool) -> dict[str, Any]:
        def loss(params: Any, x: Any) -> Any:
            y, new = run(own, {**variables, **params}, x, False)
            return (y * weights(shape)).sum(), (y, new)

        params = {k: v for k, v in variables.items() if k == "params"}
        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return {
            "outputs": y,
            "running statistics": new,
            "gradients": grads,
            "outputs in inference": run(own, variables, x, True)[0],
        }

    differs = difference(
        functools.partial(results, own=True),
        functools.partial(results, own=False),
        shape,
        float(fields["epsilon"]),
    )
    if differs is None:
        return None
    return (
        "which has the fields of flax's layer and computes something else: "
        f"{differs} differ"
    )


def _has_field(cls: type[nn.Module], name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(cls)}


def _names(tree: Any) -> set[str]:
    return {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} "
        f"{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
