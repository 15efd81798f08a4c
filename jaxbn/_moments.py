"""Count, mean and sum of squared deviations, on any number of devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import abs2, hide_from_cse, times, widen
from jaxbn._axis_names import AxisName
from jaxbn._checks import Axes, check_input, check_where, split_axes
from jaxbn._collectives import THIS_DEVICE, Devices, devices_along
from jaxbn._passes import (
    LARGEST_SHIFT,
    Centered,
    Moments,
    Passes,
    centered_moments,
)
from jaxbn._reduction import Reduction


@functools.partial(jax.jit, static_argnames=("reduction", "devices", "epsilon"))
def batch_moments(
    x: jax.Array,
    shift: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    *,
    reduction: Reduction,
    devices: Devices = THIS_DEVICE,
    epsilon: float = 0.0,
) -> Centered:
    """Returns the moments of x, without checks; shift has the same rows."""
    dtype = widen(x).dtype
    if shift is None:
        shift = jnp.zeros((*reduction.rows, *reduction.features), dtype)
    if jnp.iscomplexobj(shift) and not jnp.iscomplexobj(x):
        shift = shift.real
    shift = shift.astype(dtype)
    # The functions below must not close over traced values: they are static
    # arguments, which JAX keeps in caches.
    real = jnp.finfo(dtype).dtype

    def sums(x: jax.Array, constants: Any, shift: jax.Array) -> Any:
        where, ids = constants

        def centered(shift: jax.Array) -> jax.Array:
            d = widen(x) - reduction.broadcast(shift, ids)
            return d if where is None else jnp.where(where, d, 0)

        count = reduction.counts(where, ids, real)
        s1 = reduction.sum(centered(shift), ids)
        s2 = reduction.sum(abs2(centered(hide_from_cse(shift))), ids)
        return count, s1, s2

    def sample(x: jax.Array, constants: Any) -> Any:
        where, ids = constants
        part, x, where = reduction.sample(x, where, LARGEST_SHIFT)
        x = widen(x) if where is None else jnp.where(where, widen(x), 0)
        return part.counts(where, ids, real), part.sum(x, ids)

    passes = Passes(sums, sample, devices, epsilon)
    found: Centered = centered_moments(passes, x, (where, ids), shift)
    return found


@functools.partial(jax.jit, static_argnames="devices")
def merge_parts(
    parts: Centered, shift: jax.Array, *, devices: Devices = THIS_DEVICE
) -> Centered:
    """Merges along the first axis and over devices, in one collective."""

    def sums(parts: Centered, _: None, shift: jax.Array) -> Any:
        count, start, offset, m2 = parts
        weight = count.reshape(count.shape + (1,) * (start.ndim - count.ndim))
        d = jnp.where(weight > 0, (start - shift[None]) + offset, 0)
        s2 = m2 + weight * abs2(d)
        return count.sum(0), times(d, weight).sum(0), s2.sum(0)

    def sample(parts: Centered, _: None) -> Any:
        count, start, offset = parts[:3]
        weight = count.reshape(count.shape + (1,) * (start.ndim - count.ndim))
        mean = jnp.where(weight > 0, start + offset, 0)
        return count.sum(0), times(mean, weight).sum(0)

    passes = Passes(sums, sample, devices)
    found: Centered = centered_moments(passes, parts, None, shift)
    return found


def moments(
    x: jax.Array, *, where: jax.Array | None = None, feature_axis: Axes = -1
) -> Moments:
    """Reduces every axis of x but the features.

    m2 is the sum of squared deviations. Sums are computed about zero, or about
    the mean if those would cancel, for mean^2 > 16 var. The formula
    E[x^2] - E[x]^2 loses all digits in float32 if the mean is thousands of
    standard deviations.

    Args:
      x: (..., C), floating or complex, any unit.
      where: bool, broadcastable to x; False excludes a value, even NaN or inf.
        None includes all.
      feature_axis: the axis or axes that are not reduced.

    Returns:
      Moments in float32, or wider where x is; m2 is real.

    Raises:
      ValueError: x is not floating, where does not broadcast, or feature_axis
        is not an axis of x.

    Source: Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample
    Variance.
    """
    x = check_input(x)
    _, axes = split_axes(x, feature_axis)
    where = check_where(where, x)
    reduction = Reduction(x.shape, axes)
    found: Centered = batch_moments(x, None, where, None, reduction=reduction)
    return found.moments


def sync(
    local: Moments,
    *,
    axis_name: AxisName,
    shift: jax.Array | None = None,
) -> Moments:
    """Merges the moments of all devices along named axes.

    With d_i = mean_i - shift and n = sum n_i, one all-reduce of 2C+1 floats
    computes mean = shift + sum n_i d_i / n and
    m2 = sum (m2_i + n_i |d_i|^2) - |sum n_i d_i|^2 / n. If that difference
    would cancel, it is recomputed about the mean in a second all-reduce. So the
    shift never changes the result beyond rounding.

    Args:
      local: moments of this device's shard; the count may be 0.
      axis_name: name or tuple of names of the mapped axes to reduce over. If
        not bound, local is global already.
      shift: (C,), equal on all devices: a value near the mean, such as the
        running mean. None is 0.

    Returns:
      Moments over all devices, equal on all of them.

    Raises:
      ValueError: axis_name is not bound, but another mesh axis, or an axis of a
        similar name, is.

    Source: Chan, Golub, LeVeque (1979), Updating Formulae.
    """
    devices = devices_along(axis_name)
    if not devices.names:
        return local
    parts = stack_parts(local)
    if shift is None:
        shift = jnp.zeros(local.mean.shape, local.mean.dtype)
    found: Centered = merge_parts(parts, shift, devices=devices)
    return found.moments


def merge(*parts: Moments) -> Moments:
    """Merges the moments of disjoint parts into those of their union.

    With n = sum n_i and mean = sum n_i mean_i / n,
    m2 = sum m2_i + n_i |mean_i - mean|^2. Empty parts change nothing.

    Args:
      *parts: one or more Moments of the same features.

    Returns:
      Moments of all values together.

    Raises:
      ValueError: no parts are given.

    Example:
      >>> a, b = jnp.arange(6.0).reshape(3, 2), jnp.ones((5, 2))
      >>> together = merge(moments(a), moments(b))
      >>> whole = moments(jnp.concatenate([a, b]))
      >>> bool(jnp.allclose(together.m2, whole.m2))
      True

    Source: Chan, Golub, LeVeque (1979), Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances.
    """
    if not parts:
        raise ValueError("merge needs at least one Moments; got none.")
    return merge_stacked(stack_parts(*parts)).moments


def stack_parts(*parts: Moments) -> Centered:
    """Stacks Moments along a new first axis."""
    stacked = [jnp.stack(jnp.broadcast_arrays(*field)) for field in zip(*parts)]
    count, mean, m2 = stacked
    return Centered(count.astype(m2.dtype), mean, jnp.zeros_like(mean), m2)


def merge_stacked(parts: Centered) -> Centered:
    """Merges along the first axis, about the mean of the largest part.

    So equal means are preserved exactly.
    """
    count = parts.count
    largest = jax.nn.one_hot(
        jnp.argmax(count, 0), len(count), axis=0, dtype=bool
    )
    largest = largest.reshape(
        largest.shape + (1,) * (parts.shift.ndim - count.ndim)
    )
    shift = jnp.where(largest, parts.shift, 0).sum(0)
    found: Centered = merge_parts(parts, shift)
    return found
