"""Optimizers of fast runs, and lookahead."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

# Learning rates are per this many examples.
EXAMPLES = 1024


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


def param_labels(params: Any) -> Any:
    """Labels params for `optax.partition`.

    Labels are whitening_bias, head, norm_bias, and kernel for all others.
    """

    def name(path: tuple[Any, ...], _: jax.Array) -> str:
        layer, leaf = path[0].key, path[-1].key
        if layer == "head":
            return "head"
        if leaf == "bias":
            return "whitening_bias" if layer == "whitening" else "norm_bias"
        return "kernel"

    return jax.tree_util.tree_map_with_path(name, params)


def make_optimizer(
    config: ConfigDict, *, steps: int, bias_steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer, for gradients of the summed loss.

    Args:
      config: reads optimizer, rates, momentum and weight decay.
      steps: number of steps.
      bias_steps: step after which the whitening bias is frozen.
    """
    rate = triangular_schedule(
        steps,
        start=config.rate_start,
        peak=config.rate_peak,
        end=config.rate_end,
    )
    # With a constant gradient, Nesterov momentum scales steps by this factor.
    unit = EXAMPLES * (1 + 1 / (1 - config.momentum))
    decay = config.weight_decay * config.batch_size / unit

    def sgd(peak: float, shape: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            # Makes the decay independent of the learning rate.
            optax.add_decayed_weights(decay / peak),
            optax.sgd(
                lambda step: peak * shape(step), config.momentum, nesterov=True
            ),
        )

    if config.optimizer == "muon":
        own = config.muon
        until = optax.linear_schedule(1.0, 0.0, max(bias_steps, 1))
        return optax.partition(
            {
                "kernel": _muon(own, rate),
                "norm_bias": sgd(own.bias_learning_rate, rate),
                "whitening_bias": _freeze_after(
                    bias_steps, sgd(own.bias_learning_rate, until)
                ),
                "head": sgd(own.head_learning_rate, rate),
            },
            param_labels,
        )
    peak = config.learning_rate / unit
    return optax.partition(
        {
            "kernel": sgd(peak, rate),
            "norm_bias": sgd(peak * config.bias_scale, rate),
            "whitening_bias": _freeze_after(bias_steps, sgd(peak, rate)),
            "head": sgd(peak, rate),
        },
        param_labels,
    )


def _freeze_after(
    steps: int, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Sets updates to zero after a number of steps."""
    return optax.chain(
        optimizer,
        optax.scale_by_schedule(lambda step: jnp.where(step < steps, 1.0, 0.0)),
    )


def _muon(
    config: ConfigDict, rate: optax.Schedule
) -> optax.GradientTransformation:
    """Muon for convolution kernels, which are normalized before each step.

    Source: Jordan et al. (2024), Muon, kellerjordan.github.io/posts/muon; the
    norm as in airbench94_muon.py.
    """

    def dimensions(updates: Any) -> Any:
        return jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3), updates
        )

    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_steps=config.iterations,
            beta=config.momentum,
            nesterov=True,
            weight_dimension_numbers=dimensions,
        ),
        optax.scale_by_learning_rate(
            lambda step: config.learning_rate * rate(step)
        ),
        _renormalized(),
    )


def _renormalized() -> optax.GradientTransformation:
    """Applies the update to sqrt(D) w / |w|, where w has D outputs."""

    def change(update: jax.Array, weights: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(weights)))
        return update + weights * (jnp.sqrt(weights.shape[-1]) / norm - 1)

    return optax.stateless(
        lambda updates, params: jax.tree.map(change, updates, params)
    )


def lookahead(
    fast: Any,
    slow: Any,
    step: jax.Array,
    *,
    steps: int,
    every: int,
    decay: float,
) -> tuple[Any, Any]:
    """Lookahead: periodically averages weights and resets them to the average.

    slow <- d slow + (1 - d) fast, fast <- slow, with d = decay (step/steps)^3.
    After the last step, fast is slow.

    Args:
      fast: tree of arrays, after the step.
      slow: tree of the same structure.
      step: (), number of steps taken.
      steps: total number of steps.
      every: period in steps; 0 disables lookahead.
      decay: final value of d.

    Returns:
      (fast, slow).

    Source: Zhang et al. (2019), Lookahead Optimizer; the decay as in Jordan
    (2024).
    """
    if not every:
        return fast, slow
    due = step % every == 0
    d = decay * (step / steps) ** 3
    # A select, since a conditional would synchronize with the host.
    slow = jax.tree.map(
        lambda s, f: jnp.where(due, d * s + (1 - d) * f, s), slow, fast
    )
    taken = due | (step == steps)
    fast = jax.tree.map(lambda s, f: jnp.where(taken, s, f), slow, fast)
    return fast, slow
