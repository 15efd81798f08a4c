"""Which example of a batch reaches the logits of which."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._checks import check_input
from jaxbn.diagnostics._model import Apply, checked_logits


def influence(
    apply: Apply,
    params: Any,
    batch_stats: Any,
    x: jax.Array,
    *,
    train: bool = True,
    chunk_size: int = 1,
) -> jax.Array:
    """Returns the norm of every example's derivative by every example.

    I_ij = ||d logits_i / d x_j||_F, exact, from B * C backward passes. In
    inference it is diagonal, to the last bit. Where devices normalize alone it
    is zero, to the last bit, between examples of different devices; where
    statistics are synchronized it is nonzero everywhere. So it shows how a
    model's axis_name, groups and scopes are wired, whatever the model is. It is
    also how a network may read labels off the composition of a batch.

    Args:
      apply: (params, batch_stats, x, train=...) -> logits (B, C), on the whole
        batch; a model of several devices has its `jax.shard_map` inside.
      params, batch_stats: passed on.
      x: (B, ...) floating.
      train: whether the batch's statistics normalize, or the running ones.
      chunk_size: how many of the B * C backward passes run side by side.

    Returns:
      (B, B) in float32 or wider; row i is of the logits of example i.

    Raises:
      ValueError: x is not floating, chunk_size is not positive, or apply returns
        something else.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm, table 6, for
    what a leak does to a detector; the matrix is its derivative.
    """
    x = check_input(x)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")

    def logits(x: jax.Array) -> jax.Array:
        return checked_logits(apply, params, batch_stats, x, train=train)

    z, backward = jax.vjp(logits, x)
    rows, classes = z.shape

    def squares(entry: jax.Array) -> jax.Array:
        """Squared derivative of one logit by each example, (B,)."""
        cotangent = (jnp.arange(z.size) == entry).reshape(z.shape)
        (slope,) = backward(cotangent.astype(z.dtype))
        return jnp.square(jnp.abs(widen(slope))).reshape(len(x), -1).sum(1)

    found = jax.lax.map(
        squares, jnp.arange(z.size), batch_size=min(chunk_size, z.size)
    )
    return jnp.sqrt(found.reshape(rows, classes, len(x)).sum(1))
