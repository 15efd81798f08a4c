"""Running statistics as a pure update."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._moments import Moments


class RunningStats(NamedTuple):
    """What inference normalizes with.

    mean: (C,) in the unit of x; starts at 0.
    var: (C,) in the unit of x squared; starts at 1.
    """

    mean: jax.Array
    var: jax.Array


def init_running(
    shape: int | tuple[int, ...], *, dtype: jax.typing.DTypeLike = jnp.float32
) -> RunningStats:
    """Returns mean 0 and variance 1 in dtype, at least float32.

    Args:
      shape: C, or the shape of the features.
      dtype: of the inputs; running statistics are never narrower than
        float32, and the variance of complex inputs is real.

    Returns:
      RunningStats.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    return RunningStats(
        jnp.zeros(shape, dtype), jnp.ones(shape, jnp.finfo(dtype).dtype)
    )


def update_running(
    old: RunningStats,
    batch: Moments,
    *,
    decay: float | jax.Array,
    ddof: int = 0,
    skip_nonfinite: bool = False,
) -> RunningStats:
    """Returns decay * old + (1 - decay) * batch, without gradient.

    The batch variance is m2 / (count - ddof). A feature of which the batch
    kept nothing (no more than ddof values) keeps its old statistics.

    Args:
      old: running statistics, (C,).
      batch: moments of the batch, already global.
      decay: weight of the old value in [0, 1]; flax calls it momentum, and
        PyTorch's momentum is 1 - decay.
      ddof: 0 stores the biased variance as flax, 1 the unbiased one as
        PyTorch.
      skip_nonfinite: a batch in which any feature is not finite changes no
        statistic. Synchronized moments are not finite on all devices or on
        none, so devices agree.

    Returns:
      RunningStats in the dtype of old, or wider where the batch is.
    """
    known = batch.count > ddof
    var = batch.m2 / jnp.maximum(batch.count - ddof, 1)
    new = RunningStats(batch.mean, var)

    if skip_nonfinite:
        known &= is_finite(batch)

    def step(old: jax.Array, new: jax.Array) -> jax.Array:
        old = old.astype(jnp.promote_types(old.dtype, new.dtype))
        return jnp.where(known, decay * old + (1 - decay) * new, old)

    return jax.lax.stop_gradient(jax.tree.map(step, old, new))


def is_finite(batch: Moments) -> jax.Array:
    """Returns whether mean and m2 of every feature are finite, () bool."""
    return jnp.isfinite(batch.mean).all() & jnp.isfinite(batch.m2).all()
