"""Turns a config into data, model and optimizer of a fast run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from ml_collections import ConfigDict

from configs import fast_defaults
from train import UserError, config_checks, data
from train.augment import pixel_counts, pixel_statistics
from train.fast.augment import FLIPS
from train.fast.network import FastNet
from train.fast.optimizer import make_optimizer
from train.norms import norm_of
from train.recipe import check_seeds, one_of, steps_per_epoch
from train.topology import Topology

MIN_IMAGE_SIZE = 16  # pixels, so that three poolings leave one


class Recipe(NamedTuple):
    """What the programs compute; static while tracing."""

    model: nn.Module  # called with (images, train=..., train_bias=...)
    optimizer: optax.GradientTransformation
    pixel_mean: tuple[float, ...]  # (C,) in 0..255
    pixel_std: tuple[float, ...]
    flip: str
    translate: int
    cutout: int
    label_smoothing: float
    whitening_images: int
    whitening_epsilon: float
    lookahead_every: int
    lookahead_decay: float
    batch_size: int
    test_batch_size: int
    steps_per_epoch: int
    steps: int  # of the run
    bias_epochs: int  # in which the whitening bias is trained
    # Mesh axis of a batch. None on a single device: XLA may keep reductions over
    # an axis of size 1, with their launch overhead.
    axis: str | None = None


class Experiment(NamedTuple):
    """The components of a run that a config describes."""

    topology: Topology
    dataset: data.Dataset
    recipe: Recipe


def check(config: ConfigDict) -> None:
    """Raises UserError if the config is invalid."""
    config_checks.check(config, fast_defaults)
    check_seeds(config)
    one_of("optimizer", config.optimizer, ("sgd", "muon"))
    one_of("flip", config.flip, FLIPS)
    one_of("dtype", config.dtype, ("float32", "bfloat16", "float16"))
    if not config.widths:
        raise UserError(
            "widths must not be empty; use for example (64, 256, 256)."
        )
    if config.batch_size % config.devices:
        raise UserError(
            f"batch_size={config.batch_size} must be divisible by "
            f"devices={config.devices}."
        )


def build_experiment(config: ConfigDict) -> Experiment:
    """Builds the components of a run; compiles and writes nothing.

    Raises:
      UserError: the config is invalid, with what to change.
    """
    check(config)
    topology = _make_topology(config.devices)
    # Before reading data, to raise errors in the norm options early.
    norm = norm_of(config, topology)
    if config.norm != "none":
        norm = functools.partial(norm, use_scale=False)
        if config.devices == 1:
            norm = functools.partial(norm, axis_name=None)
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        train_split=config.train_split,
        test_split=config.test_split,
    )
    dataset = dataset._replace(
        train=_upsample(dataset.train), test=_upsample(dataset.test)
    )
    side = min(dataset.train.images.shape[1:3])
    groups = (
        side - 1
    ).bit_length() - 1  # poolings that leave at least one pixel
    if len(config.widths) > groups:
        raise UserError(
            f"widths={config.widths} has {len(config.widths)} blocks, each of "
            f"which halves the image; {side} pixels allow at most {groups}."
        )
    for key in ("translate", "cutout"):
        if config[key] >= side:
            raise UserError(
                f"{key}={config[key]} must be less than the {side} pixels of "
                "an image."
            )
    recipe = make_recipe(config, dataset, norm)
    return Experiment(topology, dataset, recipe)


def make_recipe(
    config: ConfigDict, dataset: data.Dataset, norm: Callable[..., nn.Module]
) -> Recipe:
    """Returns the recipe; norm creates a norm layer, see `FastNet`.

    Raises:
      UserError: the batch size exceeds the training split.
    """
    examples = len(dataset.train.labels)
    epoch = steps_per_epoch(config, dataset)
    # 9.9 x 48 is rounded up in floating point.
    steps = math.ceil(round(config.epochs * epoch, 6))
    bias_epochs = int(config.whitening_bias_epochs)
    mean, std = pixel_statistics(pixel_counts(dataset.train.images))
    return Recipe(
        model=FastNet(
            num_classes=dataset.num_classes,
            widths=tuple(config.widths),
            layers=config.layers,
            norm=norm,
            logit_scale=config.logit_scale,
            head_std=config.head_std,
            dtype=jnp.dtype(config.dtype),
        ),
        optimizer=make_optimizer(
            config, steps=steps, bias_steps=bias_epochs * epoch
        ),
        pixel_mean=mean,
        pixel_std=std,
        flip=config.flip,
        translate=config.translate,
        cutout=config.cutout,
        label_smoothing=config.label_smoothing,
        whitening_images=min(config.whitening_images, examples),
        whitening_epsilon=config.whitening_epsilon,
        lookahead_every=config.lookahead_every,
        lookahead_decay=config.lookahead_decay,
        batch_size=config.batch_size,
        test_batch_size=min(config.test_batch_size, len(dataset.test.labels)),
        steps_per_epoch=epoch,
        steps=steps,
        bias_epochs=bias_epochs,
        axis="data" if config.devices > 1 else None,
    )


def _make_topology(devices: int) -> Topology:
    found = jax.devices()
    if devices > len(found):
        raise UserError(
            f"devices={devices}, but only {len(found)} are available."
            + (
                f" Simulate more with --config.cpu_devices={devices}."
                if found[0].platform == "cpu"
                else ""
            )
        )
    return Topology(
        jax.make_mesh(
            (devices,),
            ("data",),
            axis_types=(AxisType.Auto,),
            devices=found[:devices],
        )
    )


def _upsample(split: data.Split) -> data.Split:
    """Repeats the pixels of images that are too small for three poolings."""
    times = -(-2 * MIN_IMAGE_SIZE // min(split.images.shape[1:3]))
    if min(split.images.shape[1:3]) >= MIN_IMAGE_SIZE:
        return split
    images = np.repeat(np.repeat(split.images, times, 1), times, 2)
    return split._replace(images=images)
