"""Settings of a run, its images as vectors, and its batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from train import UserError
from train import data as images

NAMES = ("digits", "cifar10")
Examples = tuple[np.ndarray, np.ndarray]  # x (N, D) and labels (N,)


class Settings(NamedTuple):
    """The options of the command line."""

    data: str = "digits"  # one of NAMES
    data_dir: str | None = None  # of TFDS, for CIFAR-10
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False  # smaller networks, fewer steps


class Setting(NamedTuple):
    """What all methods are trained on; a `per_seed` function sees one seed."""

    key: jax.Array  # (S,) random
    indices: Any  # (S, T, B), the examples of each step
    train: Examples
    test: Examples


class Data(NamedTuple):
    train: Examples  # x float32, each color with mean 0 and variance 1
    test: Examples  # standardized as train
    num_classes: int

    def sizes(self, *hidden: int) -> tuple[int, ...]:
        """Sizes of a network with these hidden layers."""
        return self.train[0].shape[1], *hidden, self.num_classes

    def setting(
        self, seeds: tuple[int, ...], *, steps: int, batch_size: int
    ) -> Setting:
        """Setting with `batch_indices` for each seed."""
        options = {"steps": steps, "batch_size": batch_size}
        count = len(self.train[1])
        indices = [batch_indices(count, seed=s, **options) for s in seeds]
        return Setting(keys(seeds), np.stack(indices), self.train, self.test)


def keys(seeds: tuple[int, ...]) -> jax.Array:
    """One random key per seed: (S,)."""
    return jax.vmap(jax.random.key)(np.asarray(seeds))


def load_data(settings: Settings) -> Data:
    """Reads settings.data: 1437 and 360 digits of 8x8, or CIFAR-10.

    CIFAR-10 is averaged over 2x2 pixels to 16x16; if quick, only the first 4000
    and 1000 images are read. Colors are standardized with the mean and variance
    of all training pixels, so pixels that are always white remain constant.

    Raises:
      UserError: the data is unknown, or CIFAR-10 is not found.
    """
    if settings.data not in NAMES:
        raise UserError(
            f"Unknown data {settings.data!r}; choose {' or '.join(NAMES)}."
        )
    parts = {}
    if settings.quick and settings.data != "digits":
        parts = {"train_split": "train[:4000]", "test_split": "test[:1000]"}
    found = images.load_dataset(
        settings.data, data_dir=settings.data_dir, **parts
    )
    splits = found.train, found.test
    train, test = (_halved(split.images) for split in splits)
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    rows = [((x - mean) / std).reshape(len(x), -1) for x in (train, test)]
    pairs = [(x.astype(np.float32), s.labels) for x, s in zip(rows, splits)]
    return Data(*pairs, found.num_classes)


def _halved(x: np.ndarray) -> np.ndarray:
    """Averages 2x2 pixels of images larger than 16x16."""
    n, h, w, c = x.shape
    if h <= 16:
        return x.astype(np.float32)
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4), dtype=np.float32)


def batch_indices(
    num_examples: int, *, batch_size: int, steps: int, seed: int
) -> np.ndarray:
    """Indices of the examples of each step: (steps, batch_size) int32.

    Each epoch has the order of `train.data.order`, and drops an incomplete last
    batch.
    """
    each = num_examples // batch_size
    epochs = [
        images.order(num_examples, seed=seed, epoch=epoch)[: each * batch_size]
        for epoch in range(-(-steps // each))
    ]
    return np.concatenate(epochs).reshape(-1, batch_size)[:steps].astype("i4")
