"""Settings of a run, and its images as rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from train import UserError
from train import data as images

NAMES = ("digits", "cifar10")


class Settings(NamedTuple):
    """What the command line says to every experiment.

    data: one of NAMES.
    data_dir: folder of prepared CIFAR-10; None uses that of TFDS.
    seeds: a repetition each.
    quick: smaller nets and fewer steps, for tests.
    """

    data: str = "digits"
    data_dir: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False


class Setting(NamedTuple):
    """What every arm of an experiment is trained on."""

    keys: jax.Array  # (S,) random, a seed each
    indices: np.ndarray  # (S, T, B), which examples each step sees
    train: tuple[np.ndarray, np.ndarray]  # all x (N, D), all labels (N,)
    test: tuple[np.ndarray, np.ndarray]  # likewise


class Data(NamedTuple):
    train_x: np.ndarray  # (N, D) float32, mean 0 and variance 1 a color
    train_y: np.ndarray  # (N,) int32
    test_x: np.ndarray  # (M, D) float32, in the units of train_x
    test_y: np.ndarray  # (M,) int32
    num_classes: int
    shape: tuple[int, int, int]  # (H, W, C) of an image, H * W * C = D

    @property
    def train(self) -> tuple[np.ndarray, np.ndarray]:
        return self.train_x, self.train_y

    @property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        return self.test_x, self.test_y

    def sizes(self, *hidden: int) -> tuple[int, ...]:
        """Of the layers of a net with these hidden ones."""
        return self.train_x.shape[1], *hidden, self.num_classes

    def setting(
        self, seeds: Sequence[int], *, steps: int, batch_size: int
    ) -> Setting:
        """Of steps with `batch_indices`."""
        options = {"steps": steps, "batch_size": batch_size}
        count = len(self.train_y)
        indices = [batch_indices(count, seed=s, **options) for s in seeds]
        return Setting(keys(seeds), np.stack(indices), self.train, self.test)


def keys(seeds: Sequence[int]) -> jax.Array:
    """A random key a seed: (S,)."""
    return jax.vmap(jax.random.key)(np.asarray(seeds))


def load(settings: Settings) -> Data:
    """Reads settings.data: 1437 and 360 digits of 8x8, or CIFAR-10.

    CIFAR-10 is averaged over 2x2 pixels to 16x16. Colors are standardized
    with the mean and variance of all training pixels, not pixel by pixel:
    pixels that are always white stay constant. quick reads CIFAR's first 4000
    and 1000 images.

    Raises:
      UserError: the data is unknown, or CIFAR is not there.
    """
    if settings.data not in NAMES:
        raise UserError(
            f"Unknown data {settings.data!r}; choose {' or '.join(NAMES)}."
        )
    splits = {}
    if settings.quick and settings.data != "digits":
        splits = {"train_split": "train[:4000]", "test_split": "test[:1000]"}
    found = images.load(settings.data, data_dir=settings.data_dir, **splits)
    train, test = (_halved(split.images) for split in (found.train, found.test))
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    train_x, test_x = (
        ((x - mean) / std).reshape(len(x), -1).astype(np.float32)
        for x in (train, test)
    )
    labels = found.train.labels, found.test.labels
    shape = train.shape[1:]
    return Data(train_x, labels[0], test_x, labels[1], found.num_classes, shape)


def _halved(x: np.ndarray) -> np.ndarray:
    """Averages 2x2 pixels of images larger than 16x16."""
    n, h, w, c = x.shape
    if h <= 16:
        return x.astype(np.float32)
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4), dtype=np.float32)


def batch_indices(
    num_examples: int, *, batch_size: int, steps: int, seed: int
) -> np.ndarray:
    """Which examples each step sees: (steps, batch_size) int32.

    Epoch by epoch in the order of `train.data.order`; what does not fill a
    batch is left out. A function of the arguments alone.
    """
    each = num_examples // batch_size
    epochs = [
        images.order(num_examples, seed=seed, epoch=epoch)[: each * batch_size]
        for epoch in range(-(-steps // each))
    ]
    rows = np.concatenate(epochs).reshape(-1, batch_size)
    return rows[:steps].astype(np.int32)
