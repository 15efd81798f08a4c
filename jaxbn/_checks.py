"""Checks of shapes, dtypes and axes: the one place that words an error."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.extend.core
import jax.numpy as jnp

AxisName = Hashable | tuple[Hashable, ...] | None
Axes = int | Sequence[int]


def describe(x: jax.Array) -> str:
    """Returns dtype and shape as they stand in messages: float32[8, 4]."""
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def check_input(x: jax.Array) -> jax.Array:
    """Returns x as an array; raises ValueError unless it is floating."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating; got {describe(x)}. Convert it first, for "
            "example x.astype(jnp.float32)."
        )
    return x


def split_axes(
    x: jax.Array, feature_axis: Axes
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (feature axes, reduced axes) of x, both positive and sorted."""
    given = (
        feature_axis if isinstance(feature_axis, Sequence) else (feature_axis,)
    )
    if any(not -x.ndim <= axis < x.ndim for axis in given):
        raise ValueError(
            f"feature_axis={feature_axis} is not an axis of x, which is "
            f"{describe(x)}."
        )
    features = tuple(sorted({axis % x.ndim for axis in given}))
    reduced = tuple(axis for axis in range(x.ndim) if axis not in features)
    if not reduced:
        raise ValueError(
            f"feature_axis={feature_axis} names every axis of x, which is "
            f"{describe(x)}: no axis is left to take statistics over."
        )
    return features, reduced


def check_where(where: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Returns where with as many axes as x; None stays None."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(
            f"where must be bool; got {describe(where)}. Compare first, for "
            "example where=mask > 0."
        )
    # numpy would spread a mask of shape (N,) over the last axis. It is meant
    # for the first one, and where both lengths agree nobody would notice.
    per_example = where.ndim == 1 and where.shape[0] == x.shape[0]
    if per_example and x.ndim > 1:
        index = ", ".join([":"] + ["None"] * (x.ndim - 1))
        raise ValueError(
            f"where is {describe(where)} and x is {describe(x)}: a mask over "
            f"the first axis is written where[{index}], one over the last "
            "axis where[None, :]."
        )
    try:
        fits = jnp.broadcast_shapes(where.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"where must broadcast to x; got where {describe(where)} and x "
            f"{describe(x)}."
        )
    return where.reshape((1,) * (x.ndim - where.ndim) + where.shape)


def check_features(
    name: str, value: jax.Array, x: jax.Array, features: tuple[int, ...]
) -> jax.Array:
    """Returns value as an array; raises unless it holds one value a feature."""
    value = jnp.asarray(value)
    want = tuple(x.shape[axis] for axis in features)
    if value.shape != want:
        raise ValueError(
            f"{name} must have shape {want}, one value for each feature of x "
            f"{describe(x)} on axes {features}; got {describe(value)}."
        )
    return value


def bound_axes(axis_name: AxisName) -> tuple[Hashable, ...]:
    """Returns the named axes to reduce over; () when x is already global.

    Outside shard_map, pmap and vmap(axis_name=...) there is no named axis, an
    array is the whole batch, and () is the right answer. Inside, a name that
    is not in scope is a mistake that would leave statistics unsynchronized.
    """
    if axis_name is None:
        return ()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    in_scope = jax.extend.core.unsafe_get_axis_names_DO_NOT_USE()
    missing = [name for name in names if name not in in_scope]
    if missing and in_scope:
        raise ValueError(
            f"axis_name={axis_name!r}: {missing[0]!r} is not bound here; the "
            f"named axes in scope are {sorted(map(str, in_scope))}. Use one of "
            "them, or None for statistics of this device alone."
        )
    return () if missing else names
