"""Turns a config into schedule, optimizer and model."""

from __future__ import annotations

import difflib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from configs import defaults
from train import UserError, config_checks, data, networks, processes
from train.augment import pixel_counts, pixel_statistics
from train.norms import norm_of
from train.state import Recipe, make_optimizer
from train.topology import Topology


def check(config: ConfigDict) -> None:
    """Raises UserError if the config is invalid."""
    config_checks.check(config, defaults)
    one_of("schedule", config.schedule, SCHEDULES)
    one_of("warmup_shape", config.warmup_shape, ("linear", "constant"))
    one_of("dtype", config.dtype, ("float32", "bfloat16"))
    one_of("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
    if config.average_decay and config.norm in ("flax", "none"):
        raise UserError(
            f"average_decay={config.average_decay} recomputes running "
            f"statistics, which norm={config.norm!r} does not support; use "
            "norm='jaxbn'."
        )
    if config.warmup_epochs > config.epochs:
        raise UserError(
            f"warmup_epochs={config.warmup_epochs} must not exceed "
            f"epochs={config.epochs}."
        )
    if list(config.boundaries) != sorted({*config.boundaries}):
        raise UserError(
            f"boundaries={config.boundaries} must be strictly increasing."
        )
    check_seeds(config)


def check_seeds(config: ConfigDict) -> None:
    """Raises UserError unless all seeds are in range."""
    last = config.seed + config.seeds - 1
    if not config_checks.in_range("seed", last):
        raise UserError(
            f"seed={config.seed} with seeds={config.seeds} ends at {last}; "
            f"seeds must be in {config_checks.RANGES['seed']}."
        )


def one_of(key: str, value: str, known: Any) -> None:
    """Raises UserError with a suggestion unless value is known."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0)[0]
        raise UserError(
            f"{key}={value!r} is unknown; did you mean {near!r}? Choose from "
            f"{', '.join(sorted(known))}."
        )


def steps_per_epoch(config: ConfigDict, dataset: data.Dataset) -> int:
    """Returns the number of full batches in the training split.

    Raises:
      UserError: there is none, or the total number of steps overflows int32.
    """
    examples = len(dataset.train.labels)
    steps = examples // config.batch_size
    if not steps:
        raise UserError(
            f"batch_size={config.batch_size} exceeds the {examples} "
            f"examples of {config.dataset} {config.train_split!r}."
        )
    if steps * config.epochs >= 2**31:
        raise UserError(
            f"epochs={config.epochs} of {steps} steps exceed the limit of "
            "2^31 steps."
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
    """Returns the learning rate schedule."""
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
    topology: Topology,
) -> Recipe:
    """Returns what the compiled steps are built from.

    Raises:
      UserError: the network, norm or augmentation of the config is invalid.
    """
    side = min(dataset.train.images.shape[1:3])
    if config.crop_padding >= side:
        raise UserError(
            f"crop_padding={config.crop_padding} must be less than the {side} "
            "pixels of an image: some crops would contain only padding."
        )
    mean, std = _pixels(dataset.train)
    several = config.microbatches > 1

    def network(microbatches: int) -> nn.Module:
        return networks.make(
            config,
            num_classes=dataset.num_classes,
            norm=norm_of(config, topology, microbatches=microbatches),
            dtype=jnp.dtype(config.dtype),
        )

    return Recipe(
        model=network(1),
        microbatch_model=network(config.microbatches) if several else None,
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
    """Pixel statistics; each process reads a part of the examples."""
    examples = len(split.labels)
    bounds = np.linspace(0, examples, jax.process_count() + 1).astype(int)
    first, last = bounds[jax.process_index() :][:2]
    return pixel_statistics(
        processes.sum_over_processes(pixel_counts(split.images[first:last]))
    )
