"""Normalization: the inference formula, and training with its derivative."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbn._checks import (
    Axes,
    AxisName,
    bound_axes,
    check_features,
    check_input,
    check_where,
    split_axes,
)
from jaxbn._moments import Moments, local_moments, spread
from jaxbn._sync import Groups, all_sum, sync, vary_like


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Returns (x - mean) / sqrt(var + epsilon) * scale + bias.

    The formula of inference. Computed in float32 or wider and rounded once.

    Args:
      x: (..., C), floating.
      mean: (C,) in the unit of x.
      var: (C,) in the unit of x squared.
      scale: (C,) or None for 1.
      bias: (C,) or None for 0.
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
    mean = check_features("mean", mean, x, features)
    var = check_features("var", var, x, features)
    scale, bias = _check_affine(scale, bias, x, features)
    dtype = jnp.dtype(dtype or x.dtype)
    inv = jax.lax.rsqrt(_widen(var) + epsilon)
    return _affine(_centre(x, mean, None, axes), inv, scale, bias, axes, dtype)


def standardize(
    x: jax.Array,
    *,
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    axis_index_groups: Groups = None,
    pivot: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` without scale and bias: (x - mean) / sqrt(var + epsilon).

    Args and errors as in `batch_norm`.

    Returns:
      (xhat, Moments): the standardized x and the statistics that made it.
    """
    return batch_norm(
        x,
        where=where,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
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
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    axis_index_groups: Groups = None,
    pivot: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes x with the statistics of its own batch.

    With mean and var = m2 / count over all kept values on all devices,
    xhat = (x - mean) / sqrt(var + epsilon) and y = xhat * scale + bias.
    Derivatives go through the statistics, forward and reverse, to any order:
    dxhat = (dx - E[dx] - xhat E[xhat dx]) / sqrt(var + epsilon). Only x and
    one value a feature are kept for the backward pass.

    Where `where` is False a value enters no statistic. Its output is still
    normalized, with the derivative that follows; a NaN or inf there is read as
    the mean, so that it reaches neither output nor gradient.

    Args:
      x: (..., C), floating: this device's part of the batch.
      scale: (C,) or None for 1.
      bias: (C,) or None for 0.
      where: bool, broadcastable to x; False leaves a value out. None keeps
        all.
      axis_name: name, or tuple of names, of the mapped axes the batch lies
        on. Outside any mapped axis x is already the whole batch. None takes
        the statistics of x alone.
      axis_index_groups: as in `jax.lax.psum`, where JAX supports it.
      pivot: see `sync`; a module passes its running mean.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the axis, or axes, that hold the features.
      dtype: of y; None takes that of x.

    Returns:
      (y, Moments): y has the shape of x; the moments are float32 or wider,
      the same on every device, and differentiable.

    Raises:
      ValueError: an argument does not fit x, or axis_name is not bound though
        another named axis is.

    Source: Ioffe and Szegedy (2015), Batch Normalization, Algorithm 1.
    """
    x = check_input(x)
    features, axes = split_axes(x, feature_axis)
    where = check_where(where, x)
    scale, bias = _check_affine(scale, bias, x, features)
    if pivot is not None:
        pivot = check_features("pivot", pivot, x, features)
    groups = None
    if axis_index_groups is not None:
        groups = tuple(tuple(group) for group in axis_index_groups)
    dtype = jnp.dtype(dtype or x.dtype)
    names = bound_axes(axis_name)
    plan = _Plan(axes, names, groups, float(epsilon), dtype)
    return _batch_norm(plan, x, scale, bias, where, pivot)


class _Plan(NamedTuple):
    """What is fixed while tracing."""

    axes: tuple[int, ...]
    names: tuple[Hashable, ...]
    groups: tuple[tuple[int, ...], ...] | None
    epsilon: float
    dtype: jnp.dtype


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _batch_norm(
    plan: _Plan,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    where: jax.Array | None,
    pivot: jax.Array | None,
) -> tuple[jax.Array, Moments]:
    batch = local_moments(x, where, plan.axes)
    batch = sync(
        batch,
        axis_name=plan.names or None,
        axis_index_groups=plan.groups,
        pivot=pivot,
    )
    inv = jax.lax.rsqrt(batch.var + plan.epsilon)
    centred = _centre(x, batch.mean, where, plan.axes)
    y = _affine(centred, inv, scale, bias, plan.axes, plan.dtype)
    return y, batch


@functools.partial(_batch_norm.defjvp, symbolic_zeros=True)
def _batch_norm_jvp(
    plan: _Plan, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, scale, _, where, _ = primals
    # The statistics come from the function itself, so that a derivative of
    # this rule goes through them too. As constants they bend Hessians.
    y, batch = _batch_norm(plan, *primals)
    dx, dscale, dbias = (
        None if t is None or isinstance(t, SymbolicZero) else t
        for t in tangents[:3]
    )
    # Recomputed in the backward pass from x and one value a feature: the
    # standardized float32 array is never a residual.
    linear = jax.checkpoint(functools.partial(_tangent, plan))
    dy, dmean, dm2 = linear(x, batch, scale, where, dx, dscale, dbias)
    return (y, batch), (dy, Moments(jnp.zeros_like(batch.count), dmean, dm2))


def _tangent(
    plan: _Plan,
    x: jax.Array,
    batch: Moments,
    scale: jax.Array | None,
    where: jax.Array | None,
    dx: jax.Array | None,
    dscale: jax.Array | None,
    dbias: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Derivatives of (y, mean, m2), linear in dx, dscale and dbias."""
    axes = plan.axes
    inv = jax.lax.rsqrt(batch.var + plan.epsilon)
    centred = _centre(x, batch.mean, where, axes)
    dy = jnp.zeros_like(centred)
    dmean, dm2 = jnp.zeros_like(batch.mean), jnp.zeros_like(batch.m2)
    if dx is not None:
        dx = dx.astype(centred.dtype)
        seen = dx if where is None else jnp.where(where, dx, 0)
        sums = (seen.sum(axes), (seen * centred).sum(axes))
        sums = all_sum(sums, plan.names, plan.groups)
        per_value = 1 / jnp.maximum(batch.count, 1)
        dmean, dm2 = sums[0] * per_value, 2 * sums[1]
        both = vary_like(jnp.stack([dmean, sums[1] * per_value]), x)
        moved = _not_read(x, where, dx - spread(both[0], axes))
        slope = spread(jnp.square(inv) * both[1], axes)
        dy = (moved - centred * slope) * spread(inv, axes)
        if scale is not None:
            dy = dy * spread(_widen(scale), axes)
    if dscale is not None:
        dscale = spread(_widen(dscale), axes)
        dy = dy + centred * spread(inv, axes) * dscale
    if dbias is not None:
        dy = dy + spread(_widen(dbias), axes)
    return dy.astype(plan.dtype), dmean, dm2


def _centre(
    x: jax.Array,
    mean: jax.Array,
    where: jax.Array | None,
    axes: tuple[int, ...],
) -> jax.Array:
    """x - mean in float32 or wider; a masked NaN or inf is read as mean."""
    return _not_read(x, where, _widen(x) - spread(mean, axes))


def _not_read(
    x: jax.Array, where: jax.Array | None, value: jax.Array
) -> jax.Array:
    """Puts 0 in value where x is masked out and NaN or inf."""
    if where is None:
        return value
    return jnp.where(where | jnp.isfinite(x), value, 0)


def _affine(
    centred: jax.Array,
    inv: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    axes: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """centred * inv * scale + bias, rounded once."""
    slope = inv if scale is None else inv * _widen(scale)
    y = centred * spread(slope, axes)
    if bias is not None:
        y = y + spread(_widen(bias), axes)
    return y.astype(dtype)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_affine(
    scale: jax.Array | None,
    bias: jax.Array | None,
    x: jax.Array,
    features: tuple[int, ...],
) -> tuple[jax.Array | None, jax.Array | None]:
    if scale is not None:
        scale = check_features("scale", scale, x, features)
    if bias is not None:
        bias = check_features("bias", bias, x, features)
    return scale, bias
