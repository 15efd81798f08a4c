"""Turns a config into the recipe of a run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from train import UserError, config_checks, data, networks, processes
from train.augment import (
    FLIPS,
    PAD_MODES,
    Augmentation,
    pixel_counts,
    pixel_statistics,
)
from train.norms import norm_of
from train.optimizer import OPTIMIZERS, Lookahead, make_optimizer
from train.schedules import SCHEDULES
from train.state import Phase, Recipe
from train.topology import Topology
from train.workdir import num_epochs


def check(config: ConfigDict) -> None:
    """Raises UserError if the config is invalid."""
    config_checks.check(config)
    one_of("optimizer", config.optimizer, OPTIMIZERS)
    one_of("schedule", config.schedule, SCHEDULES)
    one_of("warmup_shape", config.warmup_shape, ("linear", "constant"))
    one_of("dtype", config.dtype, ("float32", "bfloat16", "float16"))
    one_of("on_nonfinite", config.on_nonfinite, ("stop", "skip", "ignore"))
    one_of("flip", config.flip, FLIPS)
    one_of("crop_mode", config.crop_mode, PAD_MODES)
    if not config.fastnet.widths:
        raise UserError(
            "fastnet.widths must not be empty; use for example (64, 256, 256)."
        )
    if config.average_decay and config.norm in ("flax", "none"):
        raise UserError(
            f"average_decay={config.average_decay} recomputes running "
            f"statistics, which norm={config.norm!r} does not support; use "
            "norm='jaxbn'."
        )
    if config.warmup_epochs > config.epochs:
        raise UserError(
            f"warmup_epochs={config.warmup_epochs:g} must not exceed "
            f"epochs={config.epochs:g}."
        )
    if config.optimizer == "muon" and (
        config.norm == "none" or config.model not in networks.NORMALIZED
    ):
        known = " or ".join(map(repr, networks.NORMALIZED))
        raise UserError(
            "optimizer='muon' rescales kernels, so a norm layer must follow "
            f"each convolution: use a model of {known}, and a norm other than "
            f"'none'; got model={config.model!r}, norm={config.norm!r}."
        )
    if list(config.boundaries) != sorted({*config.boundaries}):
        raise UserError(
            f"boundaries={config.boundaries} must be strictly increasing."
        )
    if not config.steps_per_dispatch and not config.data_on_device:
        raise UserError(
            "steps_per_dispatch=0, an epoch at once, requires "
            "data_on_device=True."
        )
    check_seeds(config)


def check_seeds(config: ConfigDict) -> None:
    """Raises UserError unless all seeds are in range."""
    last = config.seed + config.num_seeds - 1
    if not config_checks.in_range("seed", last):
        raise UserError(
            f"seed={config.seed} with num_seeds={config.num_seeds} ends at {last}; "
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


class Steps(NamedTuple):
    """Numbers of steps, one for each batch."""

    per_epoch: int
    total: int

    @property
    def epochs(self) -> int:
        """Number of epochs, of which the last may be a part."""
        return -(-self.total // self.per_epoch)

    def of(self, epoch: int) -> int:
        """Returns the steps of an epoch; the last may have fewer."""
        return min(self.total - epoch * self.per_epoch, self.per_epoch)

    def before(self, epoch: int, batch: int) -> int:
        """Returns the number of steps before a batch of an epoch."""
        return min(epoch * self.per_epoch + batch, self.total)

    def left(self, epoch: int, batch: int) -> Iterator[tuple[int, int]]:
        """Yields (epoch, steps left in it) from a position to the end."""
        for each in range(epoch, self.epochs):
            yield each, self.of(each) - (batch if each == epoch else 0)


def count_steps(config: ConfigDict, dataset: data.Dataset) -> Steps:
    """Returns the numbers of steps, with full batches of the training split.

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
    # 9.9 x 48 is rounded up in floating point.
    total = math.ceil(round(config.epochs * steps, 6))
    if total >= 2**31:
        raise UserError(
            f"epochs={config.epochs:g} of {steps} steps exceed the limit of "
            "2^31 steps."
        )
    return Steps(steps, min(total, num_epochs(config.epochs) * steps))


def make_recipe(
    config: ConfigDict,
    dataset: data.Dataset,
    steps: Steps,
    schedule: optax.Schedule,
    topology: Topology,
) -> Recipe:
    """Returns what the compiled steps are built from.

    Raises:
      UserError: the network, norm or augmentation of the config is invalid.
    """
    side = min(dataset.train.images.shape[1:3])
    for key, reason in (
        ("crop_padding", "some crops would contain only padding"),
        ("cutout", "some images would be blank"),
    ):
        if config[key] >= side:
            raise UserError(
                f"{key}={config[key]} must be less than the {side} pixels of "
                f"an image: {reason}."
            )
    mean, std = _pixels(dataset.train)

    def network(microbatches: int) -> nn.Module:
        return networks.make(
            config,
            num_classes=dataset.num_classes,
            norm=norm_of(config, topology, microbatches=microbatches),
            dtype=jnp.dtype(config.dtype),
        )

    trained = network(config.microbatches)
    phases: tuple[Phase, ...] = ()
    if config.microbatches > 1:
        phases = (Phase(0, trained),)
    bias_epochs = 0
    if config.model == "fastnet":
        bias_epochs = config.fastnet.whitening_bias_epochs
        later = trained.clone(train_whitening_bias=False)
        phases = (Phase(0, trained), Phase(bias_epochs, later))
    lookahead = None
    if config.lookahead_every:
        lookahead = Lookahead(
            config.lookahead_every, config.lookahead_decay, steps.total
        )
    examples = len(dataset.train.labels)
    return Recipe(
        model=network(1) if config.microbatches > 1 else trained,
        phases=phases,
        microbatches=config.microbatches,
        optimizer=make_optimizer(
            config, schedule, bias_steps=bias_epochs * steps.per_epoch
        ),
        pixel_mean=mean,
        pixel_std=std,
        augmentation=Augmentation(
            padding=config.crop_padding,
            pad_mode=config.crop_mode,
            flip=config.flip,
            cutout=config.cutout,
        ),
        label_smoothing=config.label_smoothing,
        average_decay=config.average_decay or None,
        lookahead=lookahead,
        on_nonfinite=config.on_nonfinite,
        loss_scale=config.batch_size if config.dtype == "float16" else 1.0,
        init_images=networks.init_images(config, examples),
        test_time_augmentation=config.test_time_augmentation,
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
