"""Running statistics and their updates, as pure functions."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import plus, promoted, times, wide_dtype
from jaxbn._check_values import (
    check_at_least,
    check_between,
    check_ddof,
    is_known,
)
from jaxbn._compat import match_type
from jaxbn._passes import Moments


class RunningStats(NamedTuple):
    """Statistics that inference normalizes with.

    Attributes:
      mean: (C,) in the unit of x; initially 0.
      var: (C,) in the unit of x squared; initially 1.
      steps: (C,) int32, number of batches, or None if not counted.
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
      dtype: dtype of the inputs; running statistics are at least float32, and
        the variance of complex inputs is real.
      count_steps: also counts batches, as needed for cumulative and debiased
        averages.

    Returns:
      RunningStats.
    """
    dtype = wide_dtype(dtype)
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

    The batch variance is m2 / (count - ddof). A feature with no more than ddof
    values in the batch keeps its old statistics.

    Args:
      old: running statistics, (C,).
      batch: global moments of the batch.
      decay: weight of the old value in [0, 1]; momentum in flax, 1 - momentum
        in PyTorch. None weights all batches equally: after t batches the old
        value has weight t / (t + 1).
      ddof: 0 stores the biased variance, as flax; 1 the unbiased one, as
        PyTorch.
      debias: divides the weights decay**i (1 - decay) of the batches by their
        sum, so that the initial value has weight 0. After t batches the old
        value has weight decay (1 - decay**t) / (1 - decay**(t + 1)), which
        approaches decay.
      skip_nonfinite: skips the update if any feature is nonfinite.
        Synchronized moments are nonfinite on all devices or none, so devices
        agree.

    Returns:
      RunningStats in the dtype of old, or wider if the batch is.

    Raises:
      ValueError: decay is outside [0, 1] or ddof is neither 0 nor 1; decay is
        None or debias is True, but old.steps is None; debias is True and decay
        is 1.

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
        kept = known
        if known.ndim:
            kept = match_type(jnp.broadcast_to(known, mixed.shape), mixed)
        return jnp.where(kept, mixed, match_type(old, mixed))

    steps = old.steps
    if steps is not None:
        steps = steps + jnp.where(known, 1, 0)
    new = RunningStats(step(old.mean, batch.mean), step(old.var, var), steps)
    return jax.lax.stop_gradient(new)


def _weight_of_new(
    decay: float | jax.Array | None, steps: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns the weight of a batch after `steps` others; 1 for the first."""
    after = (steps + 1).astype(dtype)
    if decay is None:
        return 1 / after
    # 1 - decay**t cancels if decay is near 1; expm1 does not.
    exact = is_known(decay) and decay > 0
    log = math.log(decay) if exact else jnp.log(decay)
    return jnp.where(steps == 0, 1, (1 - decay) / -jnp.expm1(after * log))


def is_finite(batch: Moments) -> jax.Array:
    """Returns whether mean and m2 of all features are finite.

    Args:
      batch: moments; if synchronized, the result is equal on all devices.

    Returns:
      () bool.
    """
    return jnp.isfinite(batch.mean).all() & jnp.isfinite(batch.m2).all()


def adapt(
    running: RunningStats, batch: Moments, *, prior: float | jax.Array
) -> RunningStats:
    """Adapts running statistics to a batch of the test domain.

    With w = prior / (prior + count), mean = w mean_running + (1 - w)
    mean_batch and var = w var_running + (1 - w) var_batch. prior = 0 only uses
    the batch, prior = inf only the running statistics. A feature without values
    in the batch keeps its running statistics.

    Args:
      running: running statistics of the source domain, (C,).
      batch: global moments of the batch, (C,).
      prior: (), at least 0, in values per feature like batch.count: the N
        examples of the paper are N times the values of an example, such as
        N * height * width.

    Returns:
      RunningStats to normalize this batch with.

    Raises:
      ValueError: prior is negative.

    Source: Schneider et al. (2020), Improving robustness against common
    corruptions by covariate shift adaptation, equation 1.
    """
    check_at_least("prior", prior, 0)
    known = batch.count > 0
    # In this form, an infinite prior does not result in inf / inf.
    total = batch.count + jnp.asarray(prior).astype(batch.count.dtype)
    weight = jnp.where(known, batch.count / total, 0)

    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        return plus(old, times(plus(new, -old), weight))

    return running._replace(
        mean=blend(running.mean, batch.mean), var=blend(running.var, batch.var)
    )
