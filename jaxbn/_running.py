"""Running statistics as a pure update."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._arithmetic import plus, promoted, times
from jaxbn._checks import (
    check_at_least,
    check_between,
    check_ddof,
    is_known,
)
from jaxbn._compat import match_type
from jaxbn._passes import Moments


class RunningStats(NamedTuple):
    """What inference normalizes with.

    Attributes:
      mean: (C,) in the unit of x; starts at 0.
      var: (C,) in the unit of x squared; starts at 1.
      steps: (C,) int32, batches that have entered; None where nobody counts.
    """

    mean: jax.Array
    var: jax.Array
    steps: jax.Array | None = None


def init_running(
    shape: int | tuple[int, ...],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    count_steps: bool = False,
) -> RunningStats:
    """Returns mean 0 and variance 1 in dtype, at least float32.

    Args:
      shape: C, or the shape of the features.
      dtype: of the inputs; running statistics are never narrower than
        float32, and the variance of complex inputs is real.
      count_steps: counts batches too, as cumulative and debiased averages
        need.

    Returns:
      RunningStats.
    """
    dtype = np.promote_types(dtype, jnp.float32)
    return RunningStats(
        jnp.zeros(shape, dtype),
        jnp.ones(shape, jnp.finfo(dtype).dtype),
        jnp.zeros(shape, jnp.int32) if count_steps else None,
    )


def update_running(
    old: RunningStats,
    batch: Moments,
    *,
    decay: float | jax.Array | None,
    ddof: int = 0,
    debias: bool = False,
    skip_nonfinite: bool = False,
) -> RunningStats:
    """Returns decay * old + (1 - decay) * batch, without gradient.

    The batch variance is m2 / (count - ddof). A feature of which the batch
    kept nothing (no more than ddof values) keeps its old statistics.

    Args:
      old: running statistics, (C,).
      batch: moments of the batch, already global.
      decay: weight of the old value in [0, 1]; flax calls it momentum, and
        PyTorch's momentum is 1 - decay. None weighs all batches equally: after
        t of them the old value has t / (t + 1).
      ddof: 0 stores the biased variance as flax, 1 the unbiased one as
        PyTorch.
      debias: the weights decay**i (1 - decay) of the batches are divided by
        their sum, so that what the statistics started from counts nothing,
        whether 0 or 1. After t batches the old value has
        decay (1 - decay**t) / (1 - decay**(t + 1)), and decay in the end.
      skip_nonfinite: a batch in which any feature is not finite changes no
        statistic. Synchronized moments are not finite on all devices or on
        none, so devices agree.

    Returns:
      RunningStats in the dtype of old, or wider where the batch is.

    Raises:
      ValueError: decay is outside [0, 1] or ddof is neither 0 nor 1; decay is
        None or debias is True, and old counts no steps; debias is True and
        decay is 1.

    Example:
      >>> batch = Moments(jnp.array(4), jnp.array([2.0]), jnp.array([12.0]))
      >>> new = update_running(init_running(1), batch, decay=0.5)
      >>> new.mean.tolist(), new.var.tolist()
      ([1.0], [2.0])

    Source: Kingma and Ba (2015), Adam, section 3, for the weights of debias.
    """
    if decay is not None:
        check_between("decay", decay, 0, 1)
    check_ddof(ddof)
    known = batch.count > ddof
    var = batch.m2 / jnp.maximum(batch.count - ddof, 1)
    if skip_nonfinite:
        known &= is_finite(batch)
    old_weight: float | jax.Array
    new_weight: float | jax.Array
    if decay is None or debias:
        if old.steps is None:
            way = "debias=True" if debias else "decay=None"
            raise ValueError(
                f"{way} needs the number of batches so far, and old.steps is "
                "None. Start from init_running(shape, count_steps=True)."
            )
        if debias and decay is not None and is_known(decay) and decay >= 1:
            raise ValueError(f"debias=True needs decay < 1; got {decay}.")
        new_weight = _weight_of_new(decay, old.steps, var.dtype)
        old_weight = 1 - new_weight
    else:
        old_weight, new_weight = decay, 1 - decay

    def step(old: jax.Array, new: jax.Array) -> jax.Array:
        old, new = promoted(old, new)
        weights = (old_weight, new_weight)
        first, second = (jnp.asarray(w).astype(old.dtype) for w in weights)
        mixed = first * old + second * new
        kept = match_type(known, mixed) if known.ndim else known
        return jnp.where(kept, mixed, match_type(old, mixed))

    steps = old.steps
    if steps is not None:
        steps = steps + jnp.where(known, 1, 0)
    new = RunningStats(step(old.mean, batch.mean), step(old.var, var), steps)
    return jax.lax.stop_gradient(new)


def _weight_of_new(
    decay: float | jax.Array | None, steps: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Weight of a batch after `steps` others: the first has 1."""
    after = (steps + 1).astype(dtype)
    if decay is None:
        return 1 / after
    # 1 - decay**t loses its digits where decay is near 1; expm1 keeps them.
    exact = is_known(decay) and decay > 0
    log = math.log(decay) if exact else jnp.log(decay)
    return jnp.where(steps == 0, 1, (1 - decay) / -jnp.expm1(after * log))


def is_finite(batch: Moments) -> jax.Array:
    """Returns whether mean and m2 of every feature are finite.

    Args:
      batch: moments; synchronized ones give all devices the same answer.

    Returns:
      () bool.
    """
    return jnp.isfinite(batch.mean).all() & jnp.isfinite(batch.m2).all()


def adapt(
    running: RunningStats, batch: Moments, *, prior: float | jax.Array
) -> RunningStats:
    """Blends running statistics with those of a batch of the test domain.

    With w = prior / (prior + count), mean = w mean_running + (1 - w)
    mean_batch and var = w var_running + (1 - w) var_batch. prior = 0 takes the
    batch alone, prior = inf the running statistics. A feature of which the
    batch kept nothing stays as it is.

    Args:
      running: (C,), of the source domain.
      batch: moments of the batch, already global, (C,).
      prior: (), at least 0, in kept values of a feature as batch.count is: for
        the paper's N examples give N times the values of an example, such as
        N * height * width.

    Returns:
      RunningStats to normalize this batch with; running itself stays.

    Raises:
      ValueError: prior is negative.

    Source: Schneider et al. (2020), Improving robustness against common
    corruptions by covariate shift adaptation, equation 1.
    """
    check_at_least("prior", prior, 0)
    known = batch.count > 0
    # Written so that an infinite prior is not inf / inf.
    total = batch.count + jnp.asarray(prior).astype(batch.count.dtype)
    weight = jnp.where(known, batch.count / total, 0)

    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        return plus(old, times(plus(new, -old), weight))

    return running._replace(
        mean=blend(running.mean, batch.mean), var=blend(running.var, batch.var)
    )
