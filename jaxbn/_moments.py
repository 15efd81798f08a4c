"""Count, mean and summed squared deviation of a batch, and their merge."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._checks import Axes, check_input, check_where, split_axes


class Moments(NamedTuple):
    """Summary of a batch, one entry a feature; parts merge exactly.

    With ids, one row an id: mean and m2 are (K, C), count (K, 1) or (K, C).

    Attributes:
      count: () or (C,) kept values; () when every feature keeps the same ones.
      mean: (C,) in the unit of x; 0 where nothing is kept.
      m2: (C,) summed squared deviation from the mean, unit of x squared.
    """

    count: jax.Array  # type: ignore[assignment]
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
      x: (..., C), floating or complex, any unit.
      where: bool, broadcastable to x; False drops a value, even NaN or inf.
        None keeps all.
      feature_axis: the axis, or axes, that keep their statistics apart.

    Returns:
      Moments in float32, or wider where x is; m2 is real.

    Raises:
      ValueError: x is not floating, where does not fit, or feature_axis is
        not an axis of x.

    Source: Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample
    Variance, the corrected two-pass algorithm.
    """
    x = check_input(x)
    _, axes = split_axes(x, feature_axis)
    where = check_where(where, x)
    return local_moments(x, where, None, Layout(x.shape, axes)).moments


class Layout(NamedTuple):
    """Which values of x share a statistic; fixed while tracing.

    Plain, all values of a feature do, and a statistic has the shape of the
    features, F. With chunks or ids it is (rows, *F), rows = chunks * ids, chunk
    by chunk.
    """

    shape: tuple[int, ...]  # of x
    axes: tuple[int, ...]  # reduced ones, sorted; the first holds the examples
    chunks: int = 1  # equally long runs of neighbouring examples
    num_ids: int | None = None  # None: no ids

    @property
    def plain(self) -> bool:
        return self.chunks == 1 and self.num_ids is None

    @property
    def examples(self) -> int:
        return self.shape[self.axes[0]]

    @property
    def values(self) -> int:
        """Values of a feature."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def sample(self) -> tuple[slice, ...]:
        """Index of a share of the values, of every example.

        A mean over a share f of the values lies within std / sqrt(f) of the
        whole mean, whatever the values: as a shift it costs 1 / f roundings of
        the variance. Examples are the axis that may be split over devices.
        """
        stride = [slice(None)] * len(self.shape)
        if len(self.axes) > 1:
            stride[self.axes[1]] = slice(None, None, 8)
        return tuple(stride)

    def reduce(self, x: jax.Array, ids: jax.Array | None) -> jax.Array:
        """Sums over the values that share a statistic."""
        if self.plain:
            return x.sum(self.axes)
        # Every axis before the first reduced one holds features.
        x = jnp.moveaxis(x.sum(self.axes[1:]), self.axes[0], 0)
        x = x.reshape(self.chunks, -1, *x.shape[1:])
        if ids is None:
            return x.sum(1)
        # A select, not a product: NaN of one id must not reach another.
        x = jnp.where(self._member(ids, x.ndim + 1), x[:, None], 0).sum(2)
        return x.reshape(-1, *x.shape[2:])

    def spread(self, statistic: jax.Array, ids: jax.Array | None) -> jax.Array:
        """Gives the reduced axes back, so that a statistic broadcasts to x."""
        if not np.ndim(statistic):
            return statistic
        if self.plain:
            return jnp.expand_dims(statistic, self.axes)
        features = statistic.shape[1:]
        rows = statistic.reshape(self.chunks, -1, 1, *features)
        if ids is not None:
            rows = jnp.where(self._member(ids, rows.ndim), rows, 0)
        rows = rows.sum(1)
        length = self.examples // self.chunks
        rows = jnp.broadcast_to(rows, (self.chunks, length, *features))
        rows = rows.reshape(self.examples, *features)
        return jnp.expand_dims(
            jnp.moveaxis(rows, 0, self.axes[0]), self.axes[1:]
        )

    def counts(
        self,
        where: jax.Array | None,
        ids: jax.Array | None,
        dtype: jnp.dtype,
    ) -> Any:
        """Kept values a statistic: (), or with axes of length 1 or as F.

        An array of numpy where they are known while tracing.
        """
        if where is None and self.num_ids is None:
            known = np.asarray(self.values // self.chunks, dtype)
            features = len(self.shape) - len(self.axes)
            rows = (self.chunks, *(1,) * features)
            return known if self.plain else np.broadcast_to(known, rows)
        if where is None:
            where = jnp.ones((1,) * len(self.shape), bool)
        shape = list(where.shape)
        if not self.plain:
            shape[self.axes[0]] = self.examples
        where = jnp.broadcast_to(where, shape)
        seen = math.prod(shape[axis] for axis in self.axes)
        repeats = self.values // max(seen, 1)
        # Integers: a float32 sum of ones stops counting at 2^24.
        count = self.reduce(where.astype(jnp.int32), ids).astype(dtype)
        if self.plain and count.size == 1:
            count = count.reshape(())
        return count * repeats

    def _member(self, ids: jax.Array, ndim: int) -> jax.Array:
        """Whether an example has an id: (chunks, ids, examples, 1, ...)."""
        ids = ids.reshape(self.chunks, 1, -1)
        member = ids == jnp.arange(self.num_ids)[:, None]
        return member.reshape(member.shape + (1,) * (ndim - 3))


class Local(NamedTuple):
    """Moments with the mean in two parts, shift + offset.

    One float cannot hold the mean of a batch whose standard deviation is
    thousands of times smaller. Two can, and the differences of such means
    between devices come out right.
    """

    count: jax.Array  # type: ignore[assignment]
    shift: jax.Array
    offset: jax.Array
    m2: jax.Array

    @property
    def moments(self) -> Moments:
        count = jnp.asarray(self.count)
        return Moments(count, self.shift + self.offset, self.m2)


def local_moments(
    x: jax.Array,
    where: jax.Array | None,
    ids: jax.Array | None,
    layout: Layout,
) -> Local:
    """`moments` behind its checks, for any layout."""
    x = widen(x)
    count = layout.counts(where, ids, x.real.dtype)
    total = _at_least_one(count)
    if where is not None:
        x = jnp.where(where, x, 0)
    sampled, sample = layout, x
    if where is None and x.size:
        sample = x[layout.sample]
        sampled = layout._replace(shape=sample.shape)
    share = sampled.values / max(layout.values, 1)
    # Divided before they are summed: near the largest float a sum overflows.
    weight = sampled.spread(1 / (total * (share or 1)), ids)
    shift = jax.lax.stop_gradient(sampled.reduce(sample * weight, ids))

    def centred(shift: jax.Array) -> jax.Array:
        d = x - layout.spread(shift, ids)
        return d if where is None else jnp.where(where, d, 0)

    s1 = layout.reduce(centred(shift), ids)
    s2 = layout.reduce(abs2(centred(apart(shift))), ids)
    # Where squares overflow the variance is inf, and any mean will do.
    offset = jnp.where(jnp.isinf(s2), 0, s1 / total)
    m2 = jnp.maximum(s2 - total * abs2(offset), 0)
    return Local(count, shift, offset, m2)


def _at_least_one(count: Any) -> Any:
    """max(count, 1), at once where the count is known while tracing."""
    if isinstance(count, np.ndarray):
        return np.maximum(count, 1)
    return jnp.maximum(count, 1)


def apart(statistics: Any) -> Any:
    """Returns the same values, so that the compiler does not know it.

    What is computed of x and a statistic in two places is then not computed
    once, stored and read again: arithmetic is cheap and traffic is not.
    """
    return jax.lax.optimization_barrier(statistics)


def widen(x: jax.Array) -> jax.Array:
    """Returns x in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def abs2(x: jax.Array) -> jax.Array:
    """Returns |x|^2, which is real."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """a - b for a >= b in exact arithmetic; inf where a is, never inf - inf."""
    return jnp.where(jnp.isinf(a), a, jnp.maximum(a - b, 0))


def merge(*parts: Moments) -> Moments:
    """Merges the moments of disjoint parts into those of their union.

    With n = sum n_i and mean = sum n_i mean_i / n,
    m2 = sum m2_i + n_i |mean_i - mean|^2. Empty parts change nothing.

    Args:
      *parts: one or more Moments of the same features.

    Returns:
      Moments of all values together.

    Raises:
      ValueError: no part is given.

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
    stacked = [jnp.stack(jnp.broadcast_arrays(*field)) for field in zip(*parts)]
    count, mean, m2 = stacked
    return merge_stacked(Local(count, mean, jnp.zeros_like(mean), m2)).moments


def merge_stacked(parts: Local) -> Local:
    """Merges along the first axis."""
    count, shift, offset, m2 = parts
    if shift.ndim > count.ndim:
        count = count.reshape(-1, *(1,) * (shift.ndim - 1))
    total = count.sum(0)
    weight = count / jnp.maximum(total, 1)
    # Any value near the means serves. Equal means stay equal to the last bit.
    largest = jnp.arange(len(shift)) == jnp.argmax(count, 0)[..., None]
    chosen = jnp.moveaxis(largest, -1, 0)
    start = jnp.where(chosen, shift, 0).sum(0, keepdims=True)
    d = jnp.where(count > 0, shift - start + offset, 0)
    mean = (weight * d).sum(0)
    m2 = (m2 + count * abs2(d - mean)).sum(0)
    return Local(
        total.reshape(parts.count.shape[1:]),
        jnp.where(total > 0, start[0], 0),
        mean,
        m2,
    )
