"""Batch norm in training, and its derivative, without checks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxbn._affine import (
    Spec,
    affine,
    is_narrow,
    nan_for_unknown_ids,
    per_affine_row,
    subtract_shift,
    tile_rows,
    zero_masked_nonfinite,
)
from jaxbn._arithmetic import (
    hide_from_cse,
    inner,
    nonzero,
    plus,
    times,
)
from jaxbn._collectives import Devices, all_sum, vary_like
from jaxbn._merge_groups import merge_groups
from jaxbn._moments import batch_moments
from jaxbn._passes import Centered, Moments, mean_and_m2
from jaxbn.remat import INPUT, STATISTICS


class Renorm(NamedTuple):
    """Running statistics and limits of batch renormalization."""

    mean: jax.Array  # (C,) or (K, C)
    var: jax.Array  # (C,) or (K, C)
    r_max: jax.Array  # ()
    d_max: jax.Array  # ()


class Constants(NamedTuple):
    """Arrays that are not differentiated."""

    where: jax.Array | None
    ids: jax.Array | None
    shift: jax.Array | None
    renorm: Renorm | None


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    spec: Spec,
    all_devices: Devices,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    constants: Constants,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` and `batch_renorm` without checks.

    Jitted to speed up tracing: layers of equal shape share JAX's caches.
    """
    x = checkpoint_name(x, INPUT)
    y, stats = _batch_norm(spec, x, scale, bias, constants)
    return y, merge_groups(spec, stats, all_devices, constants.shift)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    spec: Spec,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    constants: Constants,
) -> tuple[jax.Array, Centered]:
    """Returns y and its statistics, in rows."""
    where, ids, shift, _ = constants
    stats = batch_moments(
        x,
        tile_rows(spec.reduction, shift),
        where,
        ids,
        reduction=spec.reduction,
        devices=spec.devices,
        epsilon=spec.epsilon,
    )
    if is_narrow(x):
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
    """Returns y, elementwise in x; masked nonfinite values act as the mean."""
    where, ids, _, renorm = constants
    scale, bias = tile_rows(spec.affine, scale), tile_rows(spec.affine, bias)
    if renorm is not None:
        r, d = per_affine_row(spec, _correction(spec, stats, renorm))
        bias = plus(times(d, scale), bias)
        scale = times(r, scale)
    inv = jax.lax.rsqrt(stats.var + spec.epsilon)
    inv, offset = per_affine_row(spec, (inv, stats.offset))
    slope = times(inv, scale)
    level = plus(times(-offset, slope), bias)
    shifted = subtract_shift(spec, x, hide_from_cse(stats.shift), ids)
    if where is not None:
        mean = spec.reduction.broadcast(stats.offset, ids)
        shifted = jnp.where(where | jnp.isfinite(x), shifted, mean)
    return affine(spec, shifted, slope, level, ids)


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(
    spec: Spec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, scale, bias, constants = primals
    # The statistics are computed by the function itself, so that higher
    # derivatives go through them. As constants they would break Hessians.
    _, stats = _batch_norm(spec, *primals)
    # A remat policy can save these, so that recomputing y needs no reduction
    # over devices; recomputing the call above would.
    stats = checkpoint_name(stats, STATISTICS)
    y = _normalize(spec, x, scale, bias, stats, constants)
    dx, dscale, dbias = (
        None if t is None or isinstance(t, SymbolicZero) else t
        for t in tangents[:3]
    )
    # Recomputed in the backward pass from x and per-feature values: the
    # standardized float32 array is never a residual. No barrier around x and
    # the cotangent, so that their sums fuse into the preceding convolution.
    linear = jax.checkpoint(
        functools.partial(_tangent, spec), prevent_cse=False
    )
    dy, dmean, dm2 = linear(x, stats, scale, constants, dx, dscale, dbias)
    # The shift is constant; the offset carries the derivative of the mean.
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
    """Returns tangents of (y, mean, m2), linear in dx, dscale and dbias."""
    where, ids, _, renorm = constants
    reduction = spec.reduction
    if not is_narrow(x):
        stats = hide_from_cse(stats)

    def shifted(shift: jax.Array) -> jax.Array:
        return zero_masked_nonfinite(
            x, where, subtract_shift(spec, x, shift, ids)
        )

    inv = jax.lax.rsqrt(stats.var + spec.epsilon)
    inv, offset = per_affine_row(spec, (inv, stats.offset))
    gain = times(inv, tile_rows(spec.affine, scale))
    dscale, dbias = (tile_rows(spec.affine, t) for t in (dscale, dbias))
    if renorm is not None:
        r, d = per_affine_row(spec, _correction(spec, stats, renorm))
        gain = times(r, gain)
        if dscale is not None:
            dbias = plus(times(d, dscale), dbias)
            dscale = times(r, dscale)
    dmean, dm2 = jnp.zeros_like(stats.offset), jnp.zeros_like(stats.m2)
    # dy = dx * gain + (x - shift) * slope + level: slope and level collect all
    # per-feature terms, so that the transpose has only two reductions.
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
    dy = plus(dy, zero_masked_nonfinite(x, where, spread(level)))
    if dx is not None:
        dy = plus(dy, zero_masked_nonfinite(x, where, times(dx, spread(gain))))
    if dbias is not None and where is not None:
        # Only the bias affects the output of a masked nonfinite value.
        dy = plus(dy, spread(dbias))
    return nan_for_unknown_ids(spec, dy, ids).astype(spec.dtype), dmean, dm2


def _correction(
    spec: Spec, stats: Centered, renorm: Renorm
) -> tuple[jax.Array, jax.Array]:
    """Returns r and d of batch renormalization, in rows.

    Not differentiated: gradients go through the batch statistics only.
    """
    mean, var, r_max, d_max = jax.lax.stop_gradient(renorm)
    stats = jax.lax.stop_gradient(stats)
    mean, var = (tile_rows(spec.reduction, a) for a in (mean, var))
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
