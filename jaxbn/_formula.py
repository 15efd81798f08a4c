"""The training formula and its derivative, behind the checks."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec

from jaxbn._moments import (
    Layout,
    Local,
    Moments,
    apart,
    local_moments,
    merge_stacked,
    widen,
)
from jaxbn._scope import Groups
from jaxbn._sync import all_sum, sync_local, vary_like
from jaxbn.remat import INPUT, STATISTICS


class Plan(NamedTuple):
    """What is fixed while tracing."""

    layout: Layout
    names: tuple[Hashable, ...]  # mapped axes to reduce over
    groups: Groups
    epsilon: float
    dtype: jnp.dtype


class Renorm(NamedTuple):
    """Running statistics that batch renormalization leans on, and how far."""

    mean: jax.Array  # (C,) or (K, C)
    var: jax.Array  # (C,) or (K, C)
    r_max: jax.Array  # ()
    d_max: jax.Array  # ()


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    plan: Plan,
    names: tuple[Hashable, ...],
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    pivot: jax.Array | None,
    renorm: Renorm | None,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` and `batch_renorm` behind their checks.

    Compiled on its own for the sake of tracing: layers of one shape share what
    JAX derives from it.
    """
    x = checkpoint_name(x, INPUT)
    y, shared = _batch_norm(plan, x, scale, bias, where, ids, pivot, renorm)
    return y, _of_all(plan, shared, names, pivot).moments


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    plan: Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    pivot: jax.Array | None,
    renorm: Renorm | None,
) -> tuple[jax.Array, Local]:
    """Returns y and the moments that made it, a row for each scope."""
    local = local_moments(x, where, ids, plan.layout)
    largest = plan.layout.values
    shared = sync_local(local, plan.names, plan.groups, pivot, largest)
    y = _apply(plan, shared, x, scale, bias, where, ids, renorm)
    return y, shared


def _apply(
    plan: Plan,
    shared: Local,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    renorm: Renorm | None,
) -> jax.Array:
    """Returns y, without a reduction."""
    inv = jax.lax.rsqrt(shared.moments.var + plan.epsilon)
    centred = _centre(plan, x, apart(shared), where, ids)
    scale, bias = in_rows(plan, scale), in_rows(plan, bias)
    if renorm is not None:
        r, d = _correction(plan, shared, renorm)
        bias = _times(d, scale) + (0 if bias is None else bias)
        scale = _times(r, scale)
    return affine(plan, centred, inv, scale, bias, ids)


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(
    plan: Plan, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, scale, bias, where, ids, _, renorm = primals
    # The statistics come from the function itself, so that a derivative of
    # this rule goes through them too. As constants they bend Hessians.
    _, shared = _batch_norm(plan, *primals)
    # A policy for recomputation keeps them, and y follows without another
    # reduction over devices; of the function above it would cost one.
    shared = checkpoint_name(shared, STATISTICS)
    y = _apply(plan, shared, x, scale, bias, where, ids, renorm)
    moving = [
        None if t is None or isinstance(t, SymbolicZero) else t
        for t in tangents[:3]
    ]
    # Recomputed in the backward pass from x and one value a feature: the
    # standardized float32 array is never a residual.
    linear = jax.checkpoint(functools.partial(_tangent, plan))
    dy, dmean, dm2 = linear(x, shared, scale, where, ids, renorm, moving)
    # Of the two parts of the mean, the shift is a constant.
    still = jnp.zeros_like(shared.count), jnp.zeros_like(shared.shift)
    return (y, shared), (dy, Local(*still, dmean, dm2))


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


def _tangent(
    plan: Plan,
    x: jax.Array,
    shared: Local,
    scale: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    renorm: Renorm | None,
    moving: list[jax.Array | None],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives of (y, mean, m2), linear in moving = (dx, dscale, dbias)."""
    dx, dscale, dbias = moving
    layout = plan.layout
    inv = jax.lax.rsqrt(shared.moments.var + plan.epsilon)
    gain = _times(inv, in_rows(plan, scale))
    dscale, dbias = in_rows(plan, dscale), in_rows(plan, dbias)
    if renorm is not None:
        r, d = _correction(plan, shared, renorm)
        gain = r * gain
        if dscale is not None:
            dbias = d * dscale + (0 if dbias is None else dbias)
            dscale = r * dscale
    dmean, dm2 = jnp.zeros_like(shared.offset), jnp.zeros_like(shared.m2)
    # dy = dx * gain + (x - shift) * slope + level: slope and level hold all
    # that is one value a feature, so that the transpose reduces twice.
    slope, level = jnp.zeros_like(inv), jnp.zeros_like(shared.offset)
    if dx is not None:
        dx = dx.astype(shared.offset.dtype)
        seen = dx if where is None else jnp.where(where, dx, 0)
        shifted = _shift(plan, x, apart(shared.shift), where, ids)
        sums = all_sum(
            (
                layout.reduce(seen, ids),
                layout.reduce(_inner(seen, shifted), ids),
            ),
            plan.names,
            plan.groups,
        )
        per_value = 1 / jnp.maximum(shared.count, 1)
        first = sums[0] * per_value
        second = sums[1] * per_value - _inner(first, shared.offset)
        dmean, dm2 = first, 2 * shared.count * second
        first, second = vary_like((first, second), x)
        level = -gain * first
        slope = -gain * jnp.square(inv) * second
    if dscale is not None:
        slope = slope + inv * dscale
    level = level - shared.offset * slope
    if dbias is not None and where is None:
        level = level + dbias
    shifted = _shift(plan, x, shared.shift, where, ids)
    dy = shifted * layout.spread(slope, ids)
    dy = dy + _read(x, where, layout.spread(level, ids))
    if dx is not None:
        dy = dy + _read(x, where, dx * layout.spread(gain, ids))
    if dbias is not None and where is not None:
        # Bias alone reaches the output of a value that is not read.
        dy = dy + layout.spread(dbias, ids)
    return _flag_ids(plan, dy, ids).astype(plan.dtype), dmean, dm2


def _of_all(
    plan: Plan,
    shared: Local,
    names: tuple[Hashable, ...],
    pivot: jax.Array | None,
) -> Local:
    """Merges the moments of the scopes into those of all examples."""
    chunks, num_ids = plan.layout.chunks, plan.layout.num_ids
    if chunks > 1:
        shared = merge_stacked(
            Local(*(a.reshape(chunks, -1, *a.shape[1:]) for a in shared))
        )
        if num_ids is None:
            shared = Local(*(a[0] for a in shared))
            shared = shared._replace(count=shared.count.reshape(()))
    if plan.groups is None and plan.names == names:
        return shared
    # The members of a group have the same moments, each counted as often.
    copies = 1 if plan.groups is None else len(plan.groups[0])
    largest = plan.layout.values * copies
    total = sync_local(shared, names, None, pivot, largest)
    return total._replace(count=total.count / copies, m2=total.m2 / copies)


def _centre(
    plan: Plan,
    x: jax.Array,
    shared: Local,
    where: jax.Array | None,
    ids: jax.Array | None,
) -> jax.Array:
    """x - mean in float32 or wider; a masked NaN or inf is read as mean."""
    offset = plan.layout.spread(shared.offset, ids)
    # One after the other: near a large mean x - shift is exact.
    return _read(x, where, _shift(plan, x, shared.shift, None, ids) - offset)


def _shift(
    plan: Plan,
    x: jax.Array,
    shift: jax.Array,
    where: jax.Array | None,
    ids: jax.Array | None,
) -> jax.Array:
    return _read(x, where, widen(x) - plan.layout.spread(shift, ids))


def _read(x: jax.Array, where: jax.Array | None, value: jax.Array) -> jax.Array:
    """Puts 0 in value where x is masked out and NaN or inf."""
    if where is None:
        return value
    return jnp.where(where | jnp.isfinite(x), value, 0)


def _correction(
    plan: Plan, shared: Local, renorm: Renorm
) -> tuple[jax.Array, jax.Array]:
    """r and d of batch renormalization, a row for each scope.

    Constants to every derivative: the gradient is that of batch norm.
    """
    mean, var, r_max, d_max = jax.lax.stop_gradient(renorm)
    batch = jax.lax.stop_gradient(shared.moments)
    inv = jax.lax.rsqrt(_rows(plan, var) + plan.epsilon)
    r = jnp.sqrt(batch.var + plan.epsilon) * inv
    d = (batch.mean - _rows(plan, mean)) * inv
    r_max, d_max = r_max.astype(inv.dtype), d_max.astype(inv.dtype)
    if jnp.iscomplexobj(d):
        length = jnp.abs(d)
        d = jnp.where(length > d_max, d / length * d_max, d)
    else:
        d = jnp.clip(d, -d_max, d_max)
    return jnp.clip(r, 1 / r_max, r_max), d


def _times(a: jax.Array, b: jax.Array | None) -> jax.Array:
    return a if b is None else a * b


def affine(
    plan: Plan,
    centred: jax.Array,
    inv: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    ids: jax.Array | None,
) -> jax.Array:
    """centred * inv * scale + bias, rounded once; scale and bias in rows."""
    slope = inv if scale is None else inv * scale
    y = centred * plan.layout.spread(slope, ids)
    if bias is not None:
        y = y + plan.layout.spread(bias, ids)
    return _flag_ids(plan, y, ids).astype(plan.dtype)


def in_rows(plan: Plan, value: jax.Array | None) -> jax.Array | None:
    """Repeats a parameter, one a feature or one an id, for every scope."""
    return None if value is None else _rows(plan, value)


def _rows(plan: Plan, value: jax.Array) -> jax.Array:
    value, layout = widen(value), plan.layout
    if layout.plain:
        return value
    if value.ndim + len(layout.axes) == len(layout.shape):
        rows = layout.chunks * (layout.num_ids or 1)
        return jnp.broadcast_to(value, (rows, *value.shape))
    return jnp.concatenate([value] * layout.chunks)


def _flag_ids(plan: Plan, y: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Puts NaN where an id is out of range: there are no statistics for it."""
    num_ids = plan.layout.num_ids
    if ids is None or num_ids is None:
        return y
    known = (ids >= 0) & (ids < num_ids)
    shape = [1] * y.ndim
    shape[plan.layout.axes[0]] = -1
    return jnp.where(known.reshape(shape), y, jnp.nan)


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the real inner product of two numbers."""
    return (a * b.conj()).real if jnp.iscomplexobj(a) else a * b
