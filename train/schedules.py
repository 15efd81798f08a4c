"""Learning rate schedules by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def triangular_schedule(
    steps: int, *, start: float, peak: float, end: float
) -> optax.Schedule:
    """Linear warmup from start to 1, then linear decay to end.

    Args:
      steps: number of steps; the value at `steps`, after the last one, is end.
      start: value at step 0, unless peak is 0.
      peak: fraction of the steps at which the value is 1.
      end: value after the last step.
    """
    rising = int(steps * peak)
    falling = optax.linear_schedule(1.0, end, steps - rising)
    if not rising:
        return falling
    warmup = optax.linear_schedule(start, 1.0, rising)
    return optax.join_schedules([warmup, falling], [rising])


def _step(config: ConfigDict, _: int) -> optax.Schedule:
    return optax.piecewise_constant_schedule(
        config.learning_rate,
        {step: config.decay_factor for step in config.boundaries},
    )


def _cosine(config: ConfigDict, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, steps)


def _one_cycle(config: ConfigDict, steps: int) -> optax.Schedule:
    return optax.cosine_onecycle_schedule(steps, config.learning_rate)


def _triangular(config: ConfigDict, steps: int) -> optax.Schedule:
    shape = triangular_schedule(steps, **config.triangular)
    return lambda step: config.learning_rate * shape(step)


SCHEDULES = {
    "step": _step,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "triangular": _triangular,
}


def make_schedule(
    config: ConfigDict, *, steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Returns the learning rate schedule.

    Args:
      config: reads schedule, learning_rate and their parameters.
      steps: number of steps of the run.
      steps_per_epoch: for the warmup.
    """
    main = SCHEDULES[config.schedule](config, steps)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    start, linear = config.warmup_start, config.warmup_shape == "linear"

    def schedule(step: jax.Array) -> jax.Array:
        if not warmup:
            return main(step)
        share = jnp.minimum((step + 1) / warmup, 1)
        if not linear:
            share = jnp.where(step < warmup, 0, 1)
        return main(step) * (start + (1 - start) * share)

    return schedule
