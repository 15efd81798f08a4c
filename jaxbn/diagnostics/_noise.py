"""Noise in an example's logits from the other examples of its batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._checks import describe
from jaxbn.diagnostics._model import Apply, checked_logits


class CompanionNoise(NamedTuple):
    """Variation of logits over random companions, in logits squared.

    Attributes:
      variance: (M,) unbiased variance over draws, averaged over logits.
      squared_bias: (M,) squared bias of the mean over draws, averaged over
        logits.
      flips: () fraction of draws and probes with a different prediction.
    """

    variance: jax.Array
    squared_bias: jax.Array
    flips: jax.Array


def companion_noise(
    apply: Apply,
    params: Any,
    batch_stats: Any,
    probes: jax.Array,
    pool: jax.Array,
    *,
    batch_size: int,
    draws: int,
    key: jax.Array,
    chunk_size: int = 1,
) -> CompanionNoise:
    """Measures the noise that companions add to an example's logits.

    In each draw, a probe is batched with batch_size - 1 companions sampled from
    the pool without replacement. With its logits z_d in training mode for draw
    d, and z in inference,
    variance = mean_c Var_d[z_dc] and
    squared_bias = mean_c (mean_d[z_dc] - z_c)^2 - variance / draws, an unbiased
    estimate, which can be negative. Probes share the companions of a draw.

    The variance scales as 1 / batch_size, times 1 - batch_size / P for a pool
    of P, so batch_size * variance is a constant of the network. Without
    synchronization, batch_size is that of one device.

    Args:
      apply: (params, batch_stats, x, train=...) -> logits (B, C).
      params, batch_stats: passed to apply.
      probes: (M, ...) examples.
      pool: (P, ...) training examples, excluding the probes.
      batch_size: from 2 to P + 1.
      draws: at least 2; the relative error of a variance is
        about sqrt(2 / draws).
      key: random key.
      chunk_size: number of draws to vectorize, with M * batch_size * chunk_size
        examples in memory; `draws` is fastest for convolutions on CPU.

    Returns:
      CompanionNoise.

    Raises:
      ValueError: probes and pool differ in shape, batch_size or draws is out of
        range, or apply returns something else.

    Source: Ioffe and Szegedy (2015), Batch Normalization, section 3.4; Luo et
    al. (2019), Towards Understanding Regularization in Batch Normalization.
    """
    probes, pool = jnp.asarray(probes), jnp.asarray(pool)
    if probes.shape[1:] != pool.shape[1:] or not probes.ndim or not len(probes):
        raise ValueError(
            "probes (M, ...) and pool (P, ...) must be examples of equal "
            f"shape; got {describe(probes)} and {describe(pool)}."
        )
    if not 2 <= batch_size <= len(pool) + 1:
        raise ValueError(
            f"batch_size must be from 2 to {len(pool) + 1}, one more than the "
            f"pool of {len(pool)}; got {batch_size}."
        )
    if draws < 2 or chunk_size < 1:
        raise ValueError(
            "draws must be at least 2 and chunk_size at least 1; got "
            f"{draws} and {chunk_size}."
        )

    def draw(key: jax.Array) -> jax.Array:
        chosen = jax.random.choice(
            key, len(pool), (batch_size - 1,), replace=False
        )
        companions = pool[chosen]

        def logits(probe: jax.Array) -> jax.Array:
            x = jnp.concatenate([probe[None].astype(pool.dtype), companions])
            return checked_logits(apply, params, batch_stats, x, train=True)[0]

        return widen(jax.vmap(logits)(probes))

    keys = jax.random.split(key, draws)
    drawn = jax.lax.map(draw, keys, batch_size=min(chunk_size, draws))
    z = widen(checked_logits(apply, params, batch_stats, probes, train=False))
    variance = drawn.var(0, ddof=1).mean(-1)
    bias = jnp.square(drawn.mean(0) - z).mean(-1) - variance / draws
    flips = (drawn.argmax(-1) != z.argmax(-1)).mean(dtype=drawn.dtype)
    return CompanionNoise(variance, bias, flips)
