"""How what there is one of a feature is applied to all its values."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxbn._arithmetic import plus, times, widen
from jaxbn._collectives import Devices
from jaxbn._reduction import Reduction


class Spec(NamedTuple):
    """What is static while tracing."""

    reduction: Reduction  # of x on a device, for its statistics
    affine: Reduction  # the same, or with ids too: rows of scale and bias
    devices: Devices  # that share statistics
    epsilon: float
    dtype: jnp.dtype  # of y


def is_narrow(x: jax.Array) -> bool:
    """Whether float32 has so many digits more than x that x - mean needs none.

    Then x * slope + level is exact enough, where level holds the mean, and one
    operation less: on TPUs that decides whether the backward pass fuses into
    the convolutions that read it.
    """
    return jnp.finfo(x.dtype).bits < jnp.finfo(widen(x).dtype).bits


def subtract_shift(
    spec: Spec, x: jax.Array, shift: jax.Array, ids: jax.Array | None
) -> jax.Array:
    """x - shift, which is exact near a large mean."""
    if is_narrow(x):  # and the shift is 0
        return widen(x)
    return widen(x) - spec.reduction.broadcast(shift, ids)


def zero_masked_nonfinite(
    x: jax.Array, where: jax.Array | None, value: jax.Array
) -> jax.Array:
    """Puts 0 in value where x is masked out and NaN or inf."""
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
    """x * slope + level, rounded once; slope and level in rows of affine."""
    y = times(x, spec.affine.broadcast(slope, ids))
    if level is not None:
        y = plus(y, spec.affine.broadcast(level, ids))
    return nan_for_unknown_ids(spec, y, ids).astype(spec.dtype)


def tile_rows(reduction: Reduction, value: Any) -> Any:
    """Repeats one value a feature, or one a feature and id, for every row."""
    if value is None:
        return None
    value = widen(value)
    if not reduction.has_rows:
        return value
    if value.ndim == len(reduction.features):
        return jnp.broadcast_to(value, (*reduction.rows, *value.shape))
    return jnp.concatenate([value] * reduction.chunks)


def per_affine_row(spec: Spec, statistics: Any) -> Any:
    """Repeats what every row of statistics has for the ids that share it."""
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
    """Puts NaN where an id is out of range: there are no statistics for it."""
    num_ids = spec.affine.num_ids
    if ids is None or num_ids is None:
        return y
    known = (ids >= 0) & (ids < num_ids)
    shape = [1] * y.ndim
    shape[spec.affine.axes[0]] = -1
    return jnp.where(known.reshape(shape), y, jnp.nan)


def without_explicit_axes(fn: Any, x: jax.Array) -> Any:
    """Leaves the sharding of what fn computes to the compiler.

    Rows of a sharded axis have no type where mesh axes are Explicit: a run of
    examples may begin on one device and end on another.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return fn
    return jax.sharding.auto_axes(
        fn, out_sharding=(jax.typeof(x).sharding.spec, PartitionSpec())
    )
