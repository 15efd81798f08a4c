"""From a config to what the compiled steps are made of."""

from __future__ import annotations

import difflib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from train import UserError, data, networks, topology
from train.augment import pixel_counts, pixel_statistics
from train.norms import norm_of
from train.step import Recipe, make_optimizer
from train.topology import Topology


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no run can have."""
    positive = ("epochs", "batch_size", "test_batch_size", "learning_rate")
    for key in positive:
        if not config[key] > 0:
            raise UserError(f"{key} must be positive; got {config[key]}.")
    one_of("schedule", config.schedule, SCHEDULES)
    one_of("warmup_shape", config.warmup_shape, ("linear", "constant"))
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
    one_of("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
    for key in ("label_smoothing", "average_decay", "warmup_start"):
        if not 0 <= config[key] < 1:
            raise UserError(f"{key} must be in [0, 1); got {config[key]}.")
    if config.average_decay and config.norm in ("flax", "none"):
        raise UserError(
            f"average_decay={config.average_decay} needs statistics taken "
            f"anew, which norm={config.norm!r} does not hand out; use jaxbn."
        )
    for key in ("microbatches", "steps_per_dispatch", "seeds"):
        if config[key] < 1:
            raise UserError(f"{key} must be at least 1; got {config[key]}.")
    if config.checkpoint_every < 0:
        raise UserError(
            f"checkpoint_every must be at least 0; got "
            f"{config.checkpoint_every}."
        )


def one_of(key: str, value: str, known: Any) -> None:
    """Raises UserError with the nearest word unless value is known."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0)[0]
        raise UserError(
            f"{key}={value!r} is unknown; did you mean {near!r}? Known are "
            f"{', '.join(sorted(known))}."
        )


def steps_per_epoch(config: ConfigDict, dataset: data.Dataset) -> int:
    """Returns how many full batches the training split has.

    Raises:
      UserError: not one.
    """
    examples = len(dataset.train.labels)
    steps = examples // config.batch_size
    if not steps:
        raise UserError(
            f"batch_size={config.batch_size} is more than the {examples} "
            f"examples of {config.dataset} {config.train_split!r}."
        )
    return steps


def _step_schedule(config: ConfigDict, _: int) -> optax.Schedule:
    return optax.piecewise_constant_schedule(
        config.learning_rate,
        {step: config.decay_factor for step in config.boundaries},
    )


def _cosine_schedule(config: ConfigDict, total: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, total)


def _one_cycle_schedule(config: ConfigDict, total: int) -> optax.Schedule:
    return optax.cosine_onecycle_schedule(total, config.learning_rate)


SCHEDULES = {
    "step": _step_schedule,
    "cosine": _cosine_schedule,
    "one_cycle": _one_cycle_schedule,
}


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the steps taken before."""
    total = steps_per_epoch * config.epochs
    main = SCHEDULES[config.schedule](config, total)
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


def make_recipe(
    config: ConfigDict,
    dataset: data.Dataset,
    schedule: optax.Schedule,
    place: Topology,
) -> Recipe:
    """Returns what the compiled steps are made from."""
    mean, std = _pixels(dataset.train)
    several = config.microbatches > 1

    def network(microbatches: int) -> nn.Module:
        return networks.make(
            config,
            num_classes=dataset.num_classes,
            norm=norm_of(config, place, microbatches=microbatches),
            dtype=jnp.dtype(config.dtype),
        )

    return Recipe(
        model=network(1),
        in_microbatches=network(config.microbatches) if several else None,
        microbatches=config.microbatches,
        optimizer=make_optimizer(
            schedule,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        ),
        pixel_mean=mean,
        pixel_std=std,
        padding=config.crop_padding,
        flip=config.flip,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        average_decay=config.average_decay or None,
        stop_if_nonfinite=config.on_nonfinite == "stop",
    )


def _pixels(
    split: data.Split,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Statistics of all pixels, of which each process counts a share."""
    examples = len(split.labels)
    bounds = np.linspace(0, examples, jax.process_count() + 1).astype(int)
    first, last = bounds[jax.process_index() :][:2]
    return pixel_statistics(
        topology.total(pixel_counts(split.images[first:last]))
    )
