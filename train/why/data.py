"""Images as rows of numbers, for nets without convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train import UserError
from train import data as images
from train.why.finding import Settings

NAMES = ("digits", "cifar10")


class Data(NamedTuple):
    train_x: np.ndarray  # (N, D) float32, mean 0 and variance 1 a color
    train_y: np.ndarray  # (N,) int32
    test_x: np.ndarray  # (M, D) float32, in the units of train_x
    test_y: np.ndarray  # (M,) int32
    num_classes: int
    shape: tuple[int, int, int]  # (H, W, C) of an image, H * W * C = D


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
    train, test = (_shrunk(split.images) for split in (found.train, found.test))
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    rows = [
        ((x - mean) / std).reshape(len(x), -1).astype(np.float32)
        for x in (train, test)
    ]
    return Data(
        rows[0],
        found.train.labels,
        rows[1],
        found.test.labels,
        found.num_classes,
        train.shape[1:],
    )


def _shrunk(x: np.ndarray) -> np.ndarray:
    """Averages 2x2 pixels of images larger than 16x16."""
    n, h, w, c = x.shape
    if h <= 16:
        return x.astype(np.float32)
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4), dtype=np.float32)


def places(
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


def places_by_seed(
    num_examples: int, *, batch_size: int, steps: int, seeds: Sequence[int]
) -> np.ndarray:
    """`places` of every seed: (S, steps, batch_size) int32."""
    return np.stack(
        [
            places(num_examples, batch_size=batch_size, steps=steps, seed=seed)
            for seed in seeds
        ]
    )
