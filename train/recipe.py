"""The recipe of a run: its network, optimizer, augmentation and options."""

from __future__ import annotations

from typing import NamedTuple

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
from train.config_checks import one_of
from train.duration import Steps
from train.norms import make_norm
from train.optimizer import OPTIMIZERS, Lookahead, make_optimizer
from train.schedules import SCHEDULES
from train.topology import Topology


class Phase(NamedTuple):
    """The network that trains from an epoch on."""

    first_epoch: int
    model: nn.Module


class Recipe(NamedTuple):
    """What training and test steps compute; static while tracing."""

    model: nn.Module  # called with (images, train=...)
    optimizer: optax.GradientTransformation
    pixel_mean: tuple[float, ...]  # (C,) in units of 0..255
    pixel_std: tuple[float, ...]
    augmentation: Augmentation
    label_smoothing: float = 0.0
    average_decay: float | None = None  # decay of the average of params
    lookahead: Lookahead | None = None
    on_nonfinite: str = "stop"  # or "skip" or "ignore" the batch
    loss_scale: float = 1.0  # keeps float16 gradients from underflowing
    microbatches: int = 1  # per device, processed in turn
    # Networks that train, by epoch, with the same variables; () is `model`.
    # They also synchronize over microbatches.
    phases: tuple[Phase, ...] = ()
    init_images: int = 1  # training images that initialize the network
    test_time_augmentation: bool = False

    def phase(self, epoch: int) -> int:
        """Returns the index of the phase of an epoch."""
        starts = [phase.first_epoch for phase in self.phases]
        return max(sum(start <= epoch for start in starts) - 1, 0)

    def training_model(self, phase: int) -> nn.Module:
        """Returns the network that trains in a phase."""
        return self.phases[phase].model if self.phases else self.model


def check_config(config: ConfigDict) -> None:
    """Raises UserError if the config is invalid."""
    config_checks.check_fields(config)
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
            f"seed={config.seed} with num_seeds={config.num_seeds} ends at "
            f"{last}; seeds must be in {config_checks.RANGES['seed']}."
        )


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
    augmentation = _make_augmentation(config, dataset.train.images.shape[1:])
    mean, std = _pixels(dataset.train)
    model, phases = _make_networks(config, dataset.num_classes, topology)
    bias_epochs = 0
    if config.model == "fastnet":
        bias_epochs = config.fastnet.whitening_bias_epochs
    lookahead = None
    if config.lookahead_every:
        lookahead = Lookahead(
            config.lookahead_every, config.lookahead_decay, steps.total
        )
    examples = len(dataset.train.labels)
    return Recipe(
        model=model,
        phases=phases,
        microbatches=config.microbatches,
        optimizer=make_optimizer(
            config, schedule, bias_steps=bias_epochs * steps.per_epoch
        ),
        pixel_mean=mean,
        pixel_std=std,
        augmentation=augmentation,
        label_smoothing=config.label_smoothing,
        average_decay=config.average_decay or None,
        lookahead=lookahead,
        on_nonfinite=config.on_nonfinite,
        loss_scale=config.batch_size if config.dtype == "float16" else 1.0,
        init_images=networks.init_images(config, examples),
        test_time_augmentation=config.test_time_augmentation,
    )


def _make_augmentation(
    config: ConfigDict, image_shape: tuple[int, ...]
) -> Augmentation:
    side = min(image_shape[:2])
    for key, reason in (
        ("crop_padding", "some crops would contain only padding"),
        ("cutout", "some images would be blank"),
    ):
        if config[key] >= side:
            raise UserError(
                f"{key}={config[key]} must be less than the {side} pixels of "
                f"an image: {reason}."
            )
    return Augmentation(
        padding=config.crop_padding,
        pad_mode=config.crop_mode,
        flip=config.flip,
        cutout=config.cutout,
    )


def _make_networks(
    config: ConfigDict, num_classes: int, topology: Topology
) -> tuple[nn.Module, tuple[Phase, ...]]:
    """Returns the network of inference, and those that train."""

    def network(microbatches: int) -> nn.Module:
        return networks.make(
            config,
            num_classes=num_classes,
            norm=make_norm(config, topology, microbatches=microbatches),
            dtype=jnp.dtype(config.dtype),
        )

    model = trained = network(config.microbatches)
    if config.microbatches > 1:
        model = network(1)
    if config.model == "fastnet":
        frozen_bias = trained.clone(train_whitening_bias=False)
        bias_epochs = config.fastnet.whitening_bias_epochs
        return model, (Phase(0, trained), Phase(bias_epochs, frozen_bias))
    return model, (Phase(0, trained),) if config.microbatches > 1 else ()


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
