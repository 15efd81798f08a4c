"""Reductions of an array to statistics, and broadcasts back."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Reduction(NamedTuple):
    """What to reduce over; static while tracing.

    By default all values of a feature share a statistic, and statistics have
    the shape of the features, F. With chunks or ids, statistics are (rows, *F),
    rows = chunks * ids, ordered by chunk.
    """

    shape: tuple[int, ...]  # of x
    axes: tuple[int, ...]  # reduced axes, sorted; the first is the batch axis
    chunks: int = 1  # contiguous chunks of examples of equal size
    num_ids: int | None = None  # None: no ids

    @property
    def has_rows(self) -> bool:
        return self.chunks != 1 or self.num_ids is not None

    @property
    def examples(self) -> int:
        return self.shape[self.axes[0]]

    @property
    def values(self) -> int:
        """Number of values per feature."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of the features, F."""
        kept = range(len(self.shape))
        return tuple(self.shape[a] for a in kept if a not in self.axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """(rows,), or () if all values of a feature share a statistic."""
        return (self.chunks * (self.num_ids or 1),) if self.has_rows else ()

    def sum(self, x: jax.Array, ids: jax.Array | None) -> jax.Array:
        """Sums over the values that share a statistic."""
        if not self.has_rows:
            return x.sum(self.axes)
        # All axes before the first reduced one are feature axes.
        x = jnp.moveaxis(x.sum(self.axes[1:]), self.axes[0], 0)
        x = x.reshape(self.chunks, -1, *x.shape[1:])
        if ids is None or self.num_ids is None:
            return x.sum(1)
        # A select, not a product: NaN of one id must not affect others.
        x = jnp.where(self._member(ids, x.ndim + 1), x[:, None], 0).sum(2)
        return x.reshape(-1, *x.shape[2:])

    def broadcast(
        self, statistic: jax.Array, ids: jax.Array | None
    ) -> jax.Array:
        """Expands a statistic so that it broadcasts to x."""
        if not np.ndim(statistic):
            return statistic
        if not self.has_rows:
            return jnp.expand_dims(statistic, self.axes)
        features = statistic.shape[1:]
        rows = statistic.reshape(self.chunks, -1, 1, *features)
        if ids is not None and self.num_ids is not None:
            rows = jnp.where(self._member(ids, rows.ndim), rows, 0)
        rows = rows.sum(1)
        length = self.examples // self.chunks
        rows = jnp.broadcast_to(rows, (self.chunks, length, *features))
        rows = rows.reshape(self.examples, *features)
        return jnp.expand_dims(
            jnp.moveaxis(rows, 0, self.axes[0]), self.axes[1:]
        )

    def sample(
        self, x: jax.Array, where: jax.Array | None, share: int
    ) -> tuple[Reduction, jax.Array, jax.Array | None]:
        """Samples at least 1 / `share` of the values of every statistic.

        Takes the same part of every example, so that masks and ids of examples
        still apply. Axes that are sharded or masked are not sampled, nor is the
        batch axis: an array with two axes is returned whole.

        Returns:
          The reduction of the sample, its values, and their mask.
        """
        spec = jax.typeof(x).sharding.spec
        left = Fraction(share)
        shape = list(self.shape)
        for axis in self.axes[1:]:
            size = shape[axis]
            masked = where is not None and where.shape[axis] != 1
            static = isinstance(size, int) and size > 0
            if not static or masked or spec[axis] is not None:
                continue
            # A slice is only worthwhile for at most half of the axis.
            kept = math.ceil(size / left)
            if 2 * kept <= size + 1:
                left = left * kept / size
                shape[axis] = kept
                x = jax.lax.slice_in_dim(x, 0, kept, axis=axis)
        return self._replace(shape=tuple(shape)), x, where

    def counts(
        self,
        where: jax.Array | None,
        ids: jax.Array | None,
        dtype: jnp.dtype,
    ) -> Any:
        """Returns the number of values per statistic.

        (), or a shape that broadcasts to statistics; a numpy array if it is
        known while tracing.
        """
        if where is None and self.num_ids is None:
            values = self.values // self.chunks
            rows = self.rows and self.rows + (1,) * len(self.features)
            if all(isinstance(n, int) for n in (values, *rows)):
                return np.full(rows, values, dtype)
            # Unknown while tracing, since the shape is symbolic.
            return jnp.broadcast_to(jnp.asarray(values).astype(dtype), rows)
        if where is None:
            where = jnp.ones((1,) * len(self.shape), bool)
        shape = list(where.shape)
        if self.has_rows:
            shape[self.axes[0]] = self.examples
        where = jnp.broadcast_to(where, shape)
        seen = math.prod(shape[axis] for axis in self.axes)
        repeats = self.values // seen if seen else 0
        # Integers, since a float32 sum of ones saturates at 2^24.
        count = self.sum(where.astype(jnp.int32), ids).astype(dtype)
        if not self.has_rows and count.size == 1:
            count = count.reshape(())
        return count * repeats

    def _member(self, ids: jax.Array, ndim: int) -> jax.Array:
        """One-hot ids of examples, (chunks, ids, examples, 1, ...)."""
        ids = ids.reshape(self.chunks, 1, -1)
        member = ids == jnp.arange(self.num_ids, dtype=ids.dtype)[None, :, None]
        return member.reshape(member.shape + (1,) * (ndim - 3))
