"""Optimizers: SGD with momentum, Muon, and lookahead."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

OPTIMIZERS = ("sgd", "muon")


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Returns SGD with momentum and L2 weight decay on kernels.

    Scale and bias are not decayed. Source: He et al. (2015), section 4.2.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.sgd(schedule, momentum, nesterov=nesterov),
    )


def is_kernel(params: Any) -> Any:
    """Returns a mask of params that is True for kernels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def param_groups(params: Any) -> Any:
    """Labels params for `optax.partition`.

    Labels are convolution and dense, for kernels; whitening_bias; and affine,
    for all other biases and scales.
    """

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        if path[-1].key == "kernel":
            return "convolution" if leaf.ndim == 4 else "dense"
        return "whitening_bias" if path[0].key == "whitening" else "affine"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, *, bias_steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer of a config, for gradients of the mean loss.

    Args:
      config: reads optimizer, learning_rate, momentum, nesterov, weight_decay,
        affine_lr_multiplier, decay_affine and muon.
      schedule: learning rate; its peak is config.learning_rate.
      bias_steps: step after which the whitening bias is frozen.
    """
    plain = config.affine_lr_multiplier == 1 and not config.decay_affine
    if config.optimizer == "sgd" and plain and not bias_steps:
        return sgd(
            schedule,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    peak, multiplier = config.learning_rate, config.affine_lr_multiplier

    def group(
        multiplier: float = 1.0,
        schedule: optax.Schedule = schedule,
        decay: bool = True,
    ) -> optax.GradientTransformation:
        """SGD at a multiple of the rate, with the same decay per step."""
        coefficient = config.weight_decay / multiplier if decay else 0.0
        return optax.chain(
            optax.add_decayed_weights(coefficient),
            optax.sgd(
                lambda step: multiplier * schedule(step),
                config.momentum,
                nesterov=config.nesterov,
            ),
        )

    affine = config.decay_affine
    if config.optimizer == "muon":
        until = optax.linear_schedule(peak, 0.0, max(bias_steps, 1))
        convolution = _muon(config.muon, lambda step: schedule(step) / peak)
        bias = group(multiplier, until, affine)
    else:
        convolution, bias = group(), group(decay=affine)
    return optax.partition(
        {
            "convolution": convolution,
            "dense": group(),
            "affine": group(multiplier, decay=affine),
            "whitening_bias": _freeze_after(bias_steps, bias),
        },
        param_groups,
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
    config: ConfigDict, shape: optax.Schedule
) -> optax.GradientTransformation:
    """Muon for convolution kernels, which are normalized before each step.

    A norm layer has to follow each convolution. Independent of the scale of
    the loss.

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
            lambda step: config.learning_rate * shape(step)
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


class Lookahead(NamedTuple):
    """Periodically averages weights, and resets them to the average.

    Every `every` steps slow <- d slow + (1 - d) fast and fast <- slow, with
    d = decay (step / steps)^3. After the last step, fast is slow.

    Attributes:
      every: period in steps.
      decay: final value of d.
      steps: number of steps of the run.

    Source: Zhang et al. (2019), Lookahead Optimizer; the decay as in Jordan
    (2024). optax.lookahead has a constant d.
    """

    every: int
    decay: float
    steps: int

    def update(self, fast: Any, slow: Any, step: jax.Array) -> tuple[Any, Any]:
        """Returns (fast, slow).

        Args:
          fast: tree of arrays, after the step.
          slow: tree of the same structure.
          step: (), number of steps taken.
        """
        due = step % self.every == 0
        d = self.decay * (step / self.steps) ** 3
        # A select, since a conditional would synchronize with the host.
        slow = jax.tree.map(
            lambda s, f: jnp.where(due, d * s + (1 - d) * f, s), slow, fast
        )
        taken = due | (step == self.steps)
        fast = jax.tree.map(lambda s, f: jnp.where(taken, s, f), slow, fast)
        return fast, slow
