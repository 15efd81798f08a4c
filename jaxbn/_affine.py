"""Applies per-feature values, such as scale and bias, to an array."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import plus, times, widen
from jaxbn._collectives import Devices
from jaxbn._reduction import Reduction


class Spec(NamedTuple):
    """Static configuration of a normalization."""

    reduction: Reduction  # for the statistics of x on a device
    affine: Reduction  # for scale and bias, which may have rows per id
    devices: Devices  # devices that share statistics
    epsilon: float
    dtype: jnp.dtype  # of y


def is_narrow(x: jax.Array) -> bool:
    """Whether x is narrower than the float32 it is computed in.

    Then x * slope + level, with the mean folded into level, is as accurate as
    (x - mean) * slope + bias, and saves an operation. On TPUs this determines
    whether the backward pass fuses into the convolutions that consume it.
    """
    return jnp.finfo(x.dtype).bits < jnp.finfo(widen(x).dtype).bits


def subtract_shift(
    spec: Spec, x: jax.Array, shift: jax.Array, ids: jax.Array | None
) -> jax.Array:
    """Returns x - shift in float32 or wider."""
    if is_narrow(x):  # and the shift is 0
        return widen(x)
    return widen(x) - spec.reduction.broadcast(shift, ids)


def zero_masked_nonfinite(
    x: jax.Array, where: jax.Array | None, value: jax.Array
) -> jax.Array:
    """Replaces value by 0 where x is masked and nonfinite."""
    if where is None:
        return value
    return jnp.where(where | jnp.isfinite(x), value, 0)


def affine(
    spec: Spec,
    x: jax.Array,
    slope: jax.Array,
    level: jax.Array | None,
    ids: jax.Array | None,
) -> jax.Array:
    """Returns x * slope + level, rounded once to spec.dtype."""
    y = times(x, spec.affine.broadcast(slope, ids))
    if level is not None:
        y = plus(y, spec.affine.broadcast(level, ids))
    return nan_for_unknown_ids(spec, y, ids).astype(spec.dtype)


def tile_rows(reduction: Reduction, value: Any) -> Any:
    """Repeats a value, (F) or (ids, F), for every row of the reduction."""
    if value is None:
        return None
    value = widen(value)
    if not reduction.has_rows:
        return value
    if value.ndim == len(reduction.features):
        return jnp.broadcast_to(value, (*reduction.rows, *value.shape))
    return jnp.concatenate([value] * reduction.chunks)


def per_affine_row(spec: Spec, statistics: Any) -> Any:
    """Repeats rows of statistics for the ids that share them."""
    if spec.affine == spec.reduction:
        return statistics
    ids = cast("int", spec.affine.num_ids)

    def repeated(value: jax.Array) -> jax.Array:
        if not spec.reduction.has_rows:
            return jnp.broadcast_to(value, (ids, *value.shape))
        return jnp.repeat(value, ids, axis=0)

    return jax.tree.map(repeated, statistics)


def nan_for_unknown_ids(
    spec: Spec, y: jax.Array, ids: jax.Array | None
) -> jax.Array:
    """Returns y with NaN for examples whose id is out of range."""
    num_ids = spec.affine.num_ids
    if ids is None or num_ids is None:
        return y
    known = (ids >= 0) & (ids < num_ids)
    shape = [1] * y.ndim
    shape[spec.affine.axes[0]] = -1
    return jnp.where(known.reshape(shape), y, jnp.nan)
