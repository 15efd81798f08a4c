"""Normalization: the inference formula, and training with its derivative."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec

from jaxbn._checks import (
    Axes,
    AxisName,
    bound_axes,
    check_features,
    check_ids,
    check_input,
    check_where,
    split_axes,
)
from jaxbn._moments import (
    Layout,
    Local,
    Moments,
    apart,
    local_moments,
    merge_stacked,
    widen,
)
from jaxbn._scope import Groups, Scope
from jaxbn._sync import all_sum, sync_local, vary_like

_EVERYTHING = Scope()


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    ids: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Returns (x - mean) / sqrt(var + epsilon) * scale + bias.

    The formula of inference. Computed in float32 or wider and rounded once.

    Args:
      x: (N, ..., C), floating or complex.
      mean: (C,) in the unit of x; (K, C) with ids.
      var: (C,) in the unit of x squared; (K, C) with ids.
      scale: (C,), with ids also (K, C), or None for 1.
      bias: likewise, or None for 0.
      ids: (N,) integers in [0, K), whose statistics an example takes; an id
        outside gives NaN.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the axis, or axes, that hold the features.
      dtype: of the result; None takes that of x.

    Returns:
      Array of the shape of x.

    Raises:
      ValueError: x is not floating, or a statistic or parameter does not hold
        one value a feature.

    Source: Ioffe and Szegedy (2015), Batch Normalization, Algorithm 2.
    """
    x = check_input(x)
    features, axes = split_axes(x, feature_axis)
    num_ids = None if ids is None else jnp.shape(mean)[0]
    ids = check_ids(ids, num_ids, x, axes)
    mean = check_features("mean", mean, x, features, num_ids)
    var = check_features("var", var, x, features, num_ids)
    scale, bias = _check_affine(scale, bias, x, features, num_ids)
    layout = Layout(x.shape, axes, num_ids=num_ids)
    plan = _Plan(layout, (), None, float(epsilon), jnp.dtype(dtype or x.dtype))
    centred = widen(x) - layout.spread(mean, ids)
    inv = jax.lax.rsqrt(widen(var) + plan.epsilon)
    return _affine(plan, centred, inv, scale, bias, ids)


def standardize(
    x: jax.Array,
    *,
    ids: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    scope: Scope = _EVERYTHING,
    pivot: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` without scale and bias: (x - mean) / sqrt(var + epsilon).

    Args and errors as in `batch_norm`.

    Returns:
      (xhat, Moments): the standardized x and the statistics of all examples.
    """
    return batch_norm(
        x,
        ids=ids,
        where=where,
        axis_name=axis_name,
        scope=scope,
        pivot=pivot,
        epsilon=epsilon,
        feature_axis=feature_axis,
        dtype=dtype,
    )


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    ids: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    scope: Scope = _EVERYTHING,
    pivot: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes x with the statistics of its own batch.

    With mean and var = m2 / count over all kept values in scope,
    xhat = (x - mean) / sqrt(var + epsilon) and y = xhat * scale + bias.
    Derivatives go through the statistics, forward and reverse, to any order:
    dxhat = (dx - E[dx] - xhat E[xhat dx]) / sqrt(var + epsilon). Only x and
    one value a feature are kept for the backward pass.

    Where `where` is False a value enters no statistic. Its output is still
    normalized, with the derivative that follows; a NaN or inf there is read as
    the mean, so that it reaches neither output nor gradient.

    Over devices this is one all-reduce forward and one backward, of 2C+1 and
    2C floats with a pivot, of 4C+2 and 2C without one. Groups gather in place
    of reducing, and take one more all-reduce for the moments of all.

    Args:
      x: (N, ..., C), floating or complex: this device's part of the batch.
      scale: (C,), with ids also (K, C), or None for 1.
      bias: likewise, or None for 0.
      ids: (N,) integers in [0, K) with K = scope.num_ids; an example with
        another id enters no statistic, and its output is NaN.
      where: bool, broadcastable to x; False leaves a value out. None keeps
        all.
      axis_name: name, or tuple of names, of the mapped axes the batch lies
        on. Outside any mapped axis x is already the whole batch. None takes
        the statistics of x alone.
      scope: which examples on these axes share statistics.
      pivot: see `sync`; a module passes its running mean. (C,), with ids
        (K, C).
      epsilon: added to the variance, unit of x squared.
      feature_axis: the axis, or axes, that hold the features.
      dtype: of y; None takes that of x.

    Returns:
      (y, Moments): y has the shape of x. The moments are float32 or wider, of
      all examples along axis_name whatever the scope, of each id, the same on
      every device, and differentiable.

    Raises:
      ValueError: an argument does not fit x, or axis_name is not bound though
        another named axis is, or the scope does not divide the batch.

    Source: Ioffe and Szegedy (2015), Batch Normalization, Algorithm 1.
    """
    x = check_input(x)
    features, axes = split_axes(x, feature_axis)
    where = check_where(where, x)
    ids = check_ids(ids, scope.num_ids, x, axes)
    scale, bias = _check_affine(scale, bias, x, features, scope.num_ids)
    if pivot is not None:
        pivot = check_features("pivot", pivot, x, features, scope.num_ids)
    layout, names, groups = scope.resolve(x, axes, axis_name)
    dtype = jnp.dtype(dtype or x.dtype)
    plan = _Plan(layout, names, groups, float(epsilon), dtype)
    run = functools.partial(_run, plan, bound_axes(axis_name))
    if not layout.plain:
        run = _without_explicit_axes(run, x)
    return run(x, scale, bias, where, ids, pivot)


class _Plan(NamedTuple):
    """What is fixed while tracing."""

    layout: Layout
    names: tuple[Hashable, ...]  # mapped axes to reduce over
    groups: Groups
    epsilon: float
    dtype: jnp.dtype


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    plan: _Plan,
    names: tuple[Hashable, ...],
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    pivot: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` behind its checks.

    Compiled on its own for the sake of tracing: layers of one shape share what
    JAX derives from it.
    """
    y, shared = _batch_norm(plan, x, scale, bias, where, ids, pivot)
    return y, _of_all(plan, shared, names, pivot).moments


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    plan: _Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    pivot: jax.Array | None,
) -> tuple[jax.Array, Local]:
    """Returns y and the moments that made it, a row for each scope."""
    local = local_moments(x, where, ids, plan.layout)
    largest = plan.layout.values
    shared = sync_local(local, plan.names, plan.groups, pivot, largest)
    inv = jax.lax.rsqrt(shared.moments.var + plan.epsilon)
    centred = _centre(plan, x, apart(shared), where, ids)
    return _affine(plan, centred, inv, scale, bias, ids), shared


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(
    plan: _Plan, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, scale, _, where, ids, _ = primals
    # The statistics come from the function itself, so that a derivative of
    # this rule goes through them too. As constants they bend Hessians.
    y, shared = _batch_norm(plan, *primals)
    moving = [
        None if t is None or isinstance(t, SymbolicZero) else t
        for t in tangents[:3]
    ]
    # Recomputed in the backward pass from x and one value a feature: the
    # standardized float32 array is never a residual.
    linear = jax.checkpoint(functools.partial(_tangent, plan))
    dy, dmean, dm2 = linear(x, shared, scale, where, ids, moving)
    # Of the two parts of the mean, the shift is a constant.
    still = jnp.zeros_like(shared.count), jnp.zeros_like(shared.shift)
    return (y, shared), (dy, Local(*still, dmean, dm2))


def _without_explicit_axes(run: Any, x: jax.Array) -> Any:
    """Leaves the sharding of what run computes to the compiler.

    Rows of a sharded axis have no type where mesh axes are Explicit: a run of
    examples may begin on one device and end on another.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return run
    return jax.sharding.auto_axes(
        run, out_sharding=(jax.typeof(x).sharding.spec, PartitionSpec())
    )


def _tangent(
    plan: _Plan,
    x: jax.Array,
    shared: Local,
    scale: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    moving: list[jax.Array | None],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives of (y, mean, m2), linear in moving = (dx, dscale, dbias)."""
    dx, dscale, dbias = moving
    layout = plan.layout
    inv = gain = jax.lax.rsqrt(shared.moments.var + plan.epsilon)
    dmean, dm2 = jnp.zeros_like(shared.offset), jnp.zeros_like(shared.m2)
    # dy = dx * gain + (x - shift) * slope + level: slope and level hold all
    # that is one value a feature, so that the transpose reduces twice.
    slope, level = jnp.zeros_like(inv), jnp.zeros_like(shared.offset)
    if scale is not None:
        gain = inv * _in_rows(plan, scale)
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
        slope = slope + inv * _in_rows(plan, dscale)
    level = level - shared.offset * slope
    if dbias is not None and where is None:
        level = level + _in_rows(plan, dbias)
    shifted = _shift(plan, x, shared.shift, where, ids)
    dy = shifted * layout.spread(slope, ids)
    dy = dy + _read(x, where, layout.spread(level, ids))
    if dx is not None:
        dy = dy + _read(x, where, dx * layout.spread(gain, ids))
    if dbias is not None and where is not None:
        # Bias alone reaches the output of a value that is not read.
        dy = dy + layout.spread(_in_rows(plan, dbias), ids)
    return _flag_ids(plan, dy, ids).astype(plan.dtype), dmean, dm2


def _of_all(
    plan: _Plan,
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
    plan: _Plan,
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
    plan: _Plan,
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


def _affine(
    plan: _Plan,
    centred: jax.Array,
    inv: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    ids: jax.Array | None,
) -> jax.Array:
    """centred * inv * scale + bias, rounded once."""
    slope = inv if scale is None else inv * _in_rows(plan, scale)
    y = centred * plan.layout.spread(slope, ids)
    if bias is not None:
        y = y + plan.layout.spread(_in_rows(plan, bias), ids)
    return _flag_ids(plan, y, ids).astype(plan.dtype)


def _in_rows(plan: _Plan, value: jax.Array) -> jax.Array:
    """Repeats a parameter, one a feature or one an id, for every scope."""
    value, layout = widen(value), plan.layout
    if layout.plain:
        return value
    if value.ndim + len(layout.axes) == len(layout.shape):
        rows = layout.chunks * (layout.num_ids or 1)
        return jnp.broadcast_to(value, (rows, *value.shape))
    return jnp.concatenate([value] * layout.chunks)


def _flag_ids(plan: _Plan, y: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Puts NaN where an id is out of range: there are no statistics for it."""
    if ids is None:
        return y
    known = (ids >= 0) & (ids < plan.layout.num_ids)
    shape = [1] * y.ndim
    shape[plan.layout.axes[0]] = -1
    return jnp.where(known.reshape(shape), y, jnp.nan)


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the real inner product of two numbers."""
    return (a * b.conj()).real if jnp.iscomplexobj(a) else a * b


def _check_affine(
    scale: jax.Array | None,
    bias: jax.Array | None,
    x: jax.Array,
    features: tuple[int, ...],
    num_ids: int | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    rows = (None,) if num_ids is None else (None, num_ids)
    if scale is not None:
        scale = check_features("scale", scale, x, features, *rows)
    if bias is not None:
        bias = check_features("bias", bias, x, features, *rows)
    return scale, bias
