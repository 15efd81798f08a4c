"""The training formula and its derivative, behind the checks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec

from jaxbn._collectives import Devices, all_sum, vary_like
from jaxbn._moments import (
    Centered,
    Moments,
    batch_moments,
    hide_from_cse,
    inner,
    mean_and_m2,
    merge_parts,
    nonzero,
    plus,
    times,
    widen,
)
from jaxbn._reduction import Reduction
from jaxbn.remat import INPUT, STATISTICS


class Spec(NamedTuple):
    """What is static while tracing."""

    reduction: Reduction  # of x on a device, for its statistics
    affine: Reduction  # the same, or with ids too: rows of scale and bias
    devices: Devices  # that share statistics
    epsilon: float
    dtype: jnp.dtype  # of y


class Renorm(NamedTuple):
    """Running statistics that batch renormalization corrects towards."""

    mean: jax.Array  # (C,) or (K, C)
    var: jax.Array  # (C,) or (K, C)
    r_max: jax.Array  # ()
    d_max: jax.Array  # ()


class Constants(NamedTuple):
    """Arrays that receive no derivative."""

    where: jax.Array | None
    ids: jax.Array | None
    shift: jax.Array | None
    renorm: Renorm | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    spec: Spec,
    everyone: Devices,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    constants: Constants,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` and `batch_renorm` behind their checks.

    Compiled on its own for the sake of tracing: layers of one shape share what
    JAX derives from it.
    """
    x = checkpoint_name(x, INPUT)
    y, stats = _batch_norm(spec, x, scale, bias, constants)
    return y, _of_all_examples(spec, stats, everyone, constants.shift)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    spec: Spec,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    constants: Constants,
) -> tuple[jax.Array, Centered]:
    """Returns y and the statistics it was normalized with, in rows."""
    where, ids, shift, _ = constants
    stats = batch_moments(
        x,
        in_rows(spec.reduction, shift),
        where,
        ids,
        reduction=spec.reduction,
        devices=spec.devices,
        epsilon=spec.epsilon,
    )
    if _is_narrow(x):
        stats = stats._replace(
            shift=jnp.zeros_like(stats.shift), offset=stats.mean
        )
    return _normalize(spec, x, scale, bias, stats, constants), stats


def _normalize(
    spec: Spec,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    stats: Centered,
    constants: Constants,
) -> jax.Array:
    """Returns y, elementwise in x; a masked NaN or inf is read as the mean."""
    where, ids, _, renorm = constants
    scale, bias = in_rows(spec.affine, scale), in_rows(spec.affine, bias)
    if renorm is not None:
        r, d = per_affine_row(spec, _correction(spec, stats, renorm))
        bias = plus(times(d, scale), bias)
        scale = times(r, scale)
    inv = jax.lax.rsqrt(stats.var + spec.epsilon)
    inv, offset = per_affine_row(spec, (inv, stats.offset))
    slope = times(inv, scale)
    level = plus(times(-offset, slope), bias)
    shifted = _shifted(spec, x, hide_from_cse(stats.shift), ids)
    if where is not None:
        mean = spec.reduction.broadcast(stats.offset, ids)
        shifted = jnp.where(where | jnp.isfinite(x), shifted, mean)
    return affine(spec, shifted, slope, level, ids)


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(
    spec: Spec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, scale, bias, constants = primals
    # The statistics come from the function itself, so that a derivative of
    # this rule goes through them too. As constants they make Hessians wrong.
    _, stats = _batch_norm(spec, *primals)
    # A policy for recomputation keeps them, and y follows without another
    # reduction over devices; of the function above it would cost one.
    stats = checkpoint_name(stats, STATISTICS)
    y = _normalize(spec, x, scale, bias, stats, constants)
    dx, dscale, dbias = (
        None if t is None or isinstance(t, SymbolicZero) else t
        for t in tangents[:3]
    )
    # Recomputed in the backward pass from x and one value a feature: the
    # standardized float32 array is never a residual. No barrier around x and
    # the cotangent: their sums fuse into the convolution that makes it.
    linear = jax.checkpoint(
        functools.partial(_tangent, spec), prevent_cse=False
    )
    dy, dmean, dm2 = linear(x, stats, scale, constants, dx, dscale, dbias)
    # Of the two parts of the mean, the shift is a constant.
    zero = jnp.zeros_like(stats.count), jnp.zeros_like(stats.shift)
    return (y, stats), (dy, Centered(*zero, dmean, dm2))


def _tangent(
    spec: Spec,
    x: jax.Array,
    stats: Centered,
    scale: jax.Array | None,
    constants: Constants,
    dx: jax.Array | None,
    dscale: jax.Array | None,
    dbias: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives of (y, mean, m2), linear in dx, dscale and dbias."""
    where, ids, _, renorm = constants
    reduction = spec.reduction
    if not _is_narrow(x):
        stats = hide_from_cse(stats)

    def shifted(shift: jax.Array) -> jax.Array:
        return readable(x, where, _shifted(spec, x, shift, ids))

    inv = jax.lax.rsqrt(stats.var + spec.epsilon)
    inv, offset = per_affine_row(spec, (inv, stats.offset))
    gain = times(inv, in_rows(spec.affine, scale))
    dscale, dbias = (in_rows(spec.affine, t) for t in (dscale, dbias))
    if renorm is not None:
        r, d = per_affine_row(spec, _correction(spec, stats, renorm))
        gain = times(r, gain)
        if dscale is not None:
            dbias = plus(times(d, dscale), dbias)
            dscale = times(r, dscale)
    dmean, dm2 = jnp.zeros_like(stats.offset), jnp.zeros_like(stats.m2)
    # dy = dx * gain + (x - shift) * slope + level: slope and level hold all
    # that is one value a feature, so that the transpose reduces twice.
    slope, level = jnp.zeros_like(inv), jnp.zeros_like(offset)
    if dx is not None:
        dx = dx.astype(stats.offset.dtype)
        kept = dx if where is None else jnp.where(where, dx, 0)
        sums = all_sum(
            (
                reduction.sum(kept, ids),
                reduction.sum(inner(kept, shifted(stats.shift)), ids),
            ),
            spec.devices,
        )
        dmean, dm2 = mean_and_m2(stats, sums[0], 2 * sums[1])
        half_dvar = dm2 / (2 * nonzero(stats.count))
        first, second = per_affine_row(spec, vary_like((dmean, half_dvar), x))
        level = times(-gain, first)
        slope = times(times(-gain, jnp.square(inv)), second)
    if dscale is not None:
        slope = plus(slope, times(inv, dscale))
    level = plus(level, times(-offset, slope))
    if where is None:
        level = plus(level, dbias)
    spread = functools.partial(spec.affine.broadcast, ids=ids)
    dy = times(shifted(hide_from_cse(stats.shift)), spread(slope))
    dy = plus(dy, readable(x, where, spread(level)))
    if dx is not None:
        dy = plus(dy, readable(x, where, times(dx, spread(gain))))
    if dbias is not None and where is not None:
        # Bias alone reaches the output of a value that is not read.
        dy = plus(dy, spread(dbias))
    return _nan_for_unknown_ids(spec, dy, ids).astype(spec.dtype), dmean, dm2


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


def _of_all_examples(
    spec: Spec,
    stats: Centered,
    everyone: Devices,
    shift: jax.Array | None,
) -> Moments:
    """Merges the moments of all groups into those of all examples."""
    chunks, num_ids = spec.reduction.chunks, spec.reduction.num_ids
    ghost = spec.reduction.chunks != 1
    if not ghost and spec.devices == everyone:
        return stats.moments
    if num_ids is not None:
        parts = Centered(*(a.reshape(chunks, -1, *a.shape[1:]) for a in stats))
    elif spec.reduction.has_rows:
        parts = stats
    else:
        parts = Centered(*(a[None] for a in stats))
    start = jnp.zeros((), parts.shift.dtype) if shift is None else widen(shift)
    start = jnp.broadcast_to(
        jax.lax.stop_gradient(start), parts.shift.shape[1:]
    )
    copies = spec.devices.size
    if spec.devices.groups is None:
        # Along the axes that were summed over, the moments are the same.
        everyone, copies = everyone.without(spec.devices.names), 1
    total = merge_parts(parts, start, devices=everyone).moments
    count = total.count
    if num_ids is None and count.size == 1:
        count = count.reshape(())
    # The members of a group have the same moments, each counted as often.
    return Moments(count / copies, total.mean, total.m2 / copies)


def _is_narrow(x: jax.Array) -> bool:
    """Whether float32 has so many digits more than x that x - mean needs none.

    Then x * slope + level is exact enough, where level holds the mean, and one
    operation less: on TPUs that decides whether the backward pass fuses into
    the convolutions that read it.
    """
    return jnp.finfo(x.dtype).bits < jnp.finfo(widen(x).dtype).bits


def _shifted(
    spec: Spec, x: jax.Array, shift: jax.Array, ids: jax.Array | None
) -> jax.Array:
    """x - shift, which is exact near a large mean."""
    if _is_narrow(x):  # and the shift is 0
        return widen(x)
    return widen(x) - spec.reduction.broadcast(shift, ids)


def readable(
    x: jax.Array, where: jax.Array | None, value: jax.Array
) -> jax.Array:
    """Puts 0 in value where x is masked out and NaN or inf."""
    if where is None:
        return value
    return jnp.where(where | jnp.isfinite(x), value, 0)


def _correction(
    spec: Spec, stats: Centered, renorm: Renorm
) -> tuple[jax.Array, jax.Array]:
    """r and d of batch renormalization, in rows.

    Constants to every derivative: the gradient is that of batch norm.
    """
    mean, var, r_max, d_max = jax.lax.stop_gradient(renorm)
    stats = jax.lax.stop_gradient(stats)
    mean, var = (in_rows(spec.reduction, a) for a in (mean, var))
    inv = jax.lax.rsqrt(var + spec.epsilon)
    r = jnp.sqrt(stats.var + spec.epsilon) * inv
    d = times(plus(stats.mean, -mean), inv)
    r_max, d_max = r_max.astype(inv.dtype), d_max.astype(inv.dtype)
    if jnp.iscomplexobj(d):
        length = jnp.abs(d)
        short = times(d, d_max / nonzero(length))
        d = jnp.where(length > d_max, short, d)
    else:
        d = jnp.clip(d, -d_max, d_max)
    return jnp.clip(r, 1 / r_max, r_max), d


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
    return _nan_for_unknown_ids(spec, y, ids).astype(spec.dtype)


def in_rows(reduction: Reduction, value: Any) -> Any:
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


def _nan_for_unknown_ids(
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
