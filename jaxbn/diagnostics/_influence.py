"""How much each example of a batch influences the logits of the others."""

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
    """Returns the Jacobian norms of logits with respect to examples.

    I_ij = ||d logits_i / d x_j||_F, exact, from B * C backward passes. In
    inference it is exactly diagonal. If devices are not synchronized, it is
    exactly zero between examples of different devices; if they are, it is
    nonzero everywhere. So it verifies the axis_name, groups and scopes of any
    model. It also measures the path by which a network can infer labels from
    the composition of a batch.

    Args:
      apply: (params, batch_stats, x, train=...) -> logits (B, C), on the global
        batch; use `jax.shard_map` inside for several devices.
      params, batch_stats: passed to apply.
      x: (B, ...) floating.
      train: whether to normalize with batch statistics or running statistics.
      chunk_size: number of backward passes to vectorize.

    Returns:
      (B, B) in float32 or wider; row i is for the logits of example i.

    Raises:
      ValueError: x is not floating, chunk_size is not positive, or apply
        returns something else.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm, table 6, on
    information leakage within a batch.
    """
    x = check_input(x)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")

    def logits(x: jax.Array) -> jax.Array:
        return checked_logits(apply, params, batch_stats, x, train=train)

    z, backward = jax.vjp(logits, x)
    rows, classes = z.shape

    def squares(entry: jax.Array) -> jax.Array:
        """Squared gradient norm of one logit, by example, (B,)."""
        cotangent = (jnp.arange(z.size) == entry).reshape(z.shape)
        (slope,) = backward(cotangent.astype(z.dtype))
        return jnp.square(jnp.abs(widen(slope))).reshape(len(x), -1).sum(1)

    found = jax.lax.map(
        squares, jnp.arange(z.size), batch_size=min(chunk_size, z.size)
    )
    return jnp.sqrt(found.reshape(rows, classes, len(x)).sum(1))
