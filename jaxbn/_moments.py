"""Count, mean and summed squared deviation of a batch, and their merge."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._checks import Axes, check_input, check_where, split_axes


class Moments(NamedTuple):
    """Summary of a batch, one entry a feature; parts merge exactly.

    count: () or (C,) kept values; () when every feature keeps the same ones.
    mean: (C,) in the unit of x; 0 where nothing is kept.
    m2: (C,) summed squared deviation from the mean, unit of x squared.
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    @property
    def var(self) -> jax.Array:
        """Biased variance m2 / count, (C,); 0 where nothing is kept."""
        return self.m2 / jnp.maximum(self.count, 1)


def moments(
    x: jax.Array, *, where: jax.Array | None = None, feature_axis: Axes = -1
) -> Moments:
    """Reduces every axis of x but the features, in two passes.

    The first pass finds a shift k near the mean, the second sums about it:
    mean = k + sum(x - k) / n and m2 = sum((x - k)^2) - sum(x - k)^2 / n. The
    second terms remove what rounding left in k. One pass, E[x^2] - E[x]^2,
    loses all digits once the mean is some thousand standard deviations.

    Args:
      x: (..., C), floating, any unit.
      where: bool, broadcastable to x; False drops a value, even NaN or inf.
        None keeps all.
      feature_axis: the axis, or axes, that keep their statistics apart.

    Returns:
      Moments in float32, or wider where x is.

    Raises:
      ValueError: x is not floating, where does not fit, or feature_axis is
        not an axis of x.

    Source: Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample
    Variance, the corrected two-pass algorithm.
    """
    x = check_input(x)
    _, axes = split_axes(x, feature_axis)
    return local_moments(x, check_where(where, x), axes)


def local_moments(
    x: jax.Array, where: jax.Array | None, axes: tuple[int, ...]
) -> Moments:
    """`moments` behind its checks, over the reduced axes."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = kept(x, where, axes)
    # Divided before they are summed: near the largest float a sum overflows.
    weight = 1 / jnp.maximum(count, 1)
    per_value = spread(weight, axes)
    if where is not None:
        x = jnp.where(where, x, 0)
    shift = jax.lax.stop_gradient((x * per_value).sum(axes))
    centred = x - spread(shift, axes)
    if where is not None:
        centred = jnp.where(where, centred, 0)
    offset = (centred * per_value).sum(axes)
    var = (jnp.square(centred) * per_value).sum(axes) - jnp.square(offset)
    return Moments(count, shift + offset, jnp.maximum(var, 0) * count)


def kept(
    x: jax.Array, where: jax.Array | None, axes: tuple[int, ...]
) -> jax.Array:
    """Counts the kept values, () or one a feature, in the dtype of x."""
    if where is None:
        size = 1
        for axis in axes:
            size *= x.shape[axis]
        return jnp.asarray(size, x.dtype)
    repeats = 1
    for axis in axes:
        repeats *= x.shape[axis] // max(where.shape[axis], 1)
    # Integers: a float32 sum of ones stops counting at 2^24.
    count = where.sum(axes, dtype=jnp.int32).astype(x.dtype) * repeats
    if count.size == 1:
        return count.reshape(())
    features = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    return jnp.broadcast_to(count, features)


def spread(statistic: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Gives a statistic the reduced axes back, so that it broadcasts to x."""
    return jnp.expand_dims(statistic, axes) if statistic.ndim else statistic


def merge(*parts: Moments) -> Moments:
    """Merges the moments of disjoint parts into those of their union.

    With n = sum n_i and mean = sum n_i mean_i / n,
    m2 = sum m2_i + n_i (mean_i - mean)^2. Empty parts change nothing.

    Args:
      *parts: one or more Moments of the same features.

    Returns:
      Moments of all values together.

    Raises:
      ValueError: no part is given.

    Source: Chan, Golub, LeVeque (1979), Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances.
    """
    if not parts:
        raise ValueError("merge needs at least one Moments; got none.")
    count = sum(part.count for part in parts)
    # About the first mean, so that equal means stay equal to the last bit.
    start = parts[0].mean
    total = jnp.maximum(count, 1)
    mean = start + sum(p.count * (p.mean - start) for p in parts) / total
    m2 = sum(p.m2 + p.count * jnp.square(p.mean - mean) for p in parts)
    return Moments(count, mean, m2)
