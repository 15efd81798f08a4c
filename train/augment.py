"""Image preprocessing and augmentation on the device.

Random numbers are a function of (seed, epoch, example index), so that they
depend neither on the batch nor on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PAD_MODES = ("zeros", "reflect")
FLIPS = ("random", "alternating", "none")


class Augmentation(NamedTuple):
    """How training images are augmented.

    Attributes:
      padding: maximum translation of the random crop in pixels; 0 disables it.
      pad_mode: what lies outside of the image: "zeros", the mean after
        normalization, or "reflect", as numpy's, without repeating the border.
      flip: "random" flips horizontally with probability 1/2. "alternating"
        does so in the first epoch, and then in every other epoch, so that any
        two successive epochs show both (Jordan, 2024). "none" never flips.
      cutout: side of the square that is set to zero; 0 disables it.
    """

    padding: int = 0
    pad_mode: str = "zeros"
    flip: str = "none"
    cutout: int = 0


class Draws(NamedTuple):
    """Random numbers of an augmentation; leading axes are shared by all."""

    offset: jax.Array  # (..., 2) int32, source of pixel (0, 0)
    flip: jax.Array  # (...) bool
    corner: jax.Array  # (..., 2) int32, first row and column of the cutout


def pixel_counts(images: np.ndarray) -> np.ndarray:
    """Returns a histogram of each channel, (C, 256) integers.

    Args:
      images: (N, H, W, C) uint8, in host memory.
    """
    channels = np.moveaxis(images, -1, 0)
    return np.stack([np.bincount(c.ravel(), minlength=256) for c in channels])


def pixel_statistics(
    histogram: np.ndarray,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel, in 0..255.

    Exact, from the histogram, without a floating-point copy of the images.

    Args:
      histogram: (C, 256), from `pixel_counts`; additive over parts.
    """
    levels = np.arange(256)
    means, stds = [], []
    for counts in histogram:
        mean = np.average(levels, weights=counts)
        var = np.average((levels - mean) ** 2, weights=counts)
        means.append(float(mean))
        stds.append(float(np.sqrt(var)))
    return tuple(means), tuple(stds)


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per example, independent of batch and device.

    Args:
      key: key of the run and epoch.
      index: (B,) integers, indices into the training split.

    Returns:
      (B,) keys.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def to_float(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """Returns (images - mean) / std in float32.

    Args:
      images: (B, H, W, C) uint8.
      mean: (C,) in the same 0..255 units.
      std: (C,) likewise.

    Returns:
      (B, H, W, C) float32.
    """
    return (images.astype(jnp.float32) - jnp.array(mean)) / jnp.array(std)


def draw(
    augmentation: Augmentation,
    index: jax.Array,
    image_shape: Sequence[int],
    *,
    seed: int | jax.Array,
    epoch: int | jax.Array,
) -> Draws:
    """Draws the random numbers of each example for an epoch.

    Args:
      augmentation: what to draw for.
      index: (...) integers, indices into the training split.
      image_shape: (H, W, C).
      seed: seed of the run.
      epoch: from 0.

    Returns:
      Draws with the leading axes of index.
    """
    padding, side = augmentation.padding, augmentation.cutout
    limit = jnp.array([size - side + 1 for size in image_shape[:2]])
    run = jax.random.key(seed)

    def keys(epoch: int | jax.Array) -> jax.Array:
        return example_keys(jax.random.fold_in(run, epoch), index.ravel())

    def flips(key: jax.Array) -> jax.Array:
        _, for_flip = jax.random.split(key)
        return jax.random.bernoulli(for_flip)

    def one(key: jax.Array) -> Draws:
        for_crop, _ = jax.random.split(key)
        start = jax.random.randint(for_crop, (2,), 0, 2 * padding + 1)
        for_cutout = jax.random.fold_in(key, 2)
        corner = jax.random.randint(for_cutout, (2,), 0, limit)
        return Draws(start - padding, flips(key), corner)

    draws = jax.vmap(one)(keys(epoch))
    if augmentation.flip == "alternating":
        first = jax.vmap(flips)(keys(0))
        draws = draws._replace(flip=first ^ (epoch % 2 == 1))
    elif augmentation.flip == "none":
        draws = draws._replace(flip=jnp.zeros_like(draws.flip))
    return jax.tree.map(lambda a: a.reshape(*index.shape, *a.shape[1:]), draws)


def crop_and_flip(
    images: jax.Array,
    rows: jax.Array,
    offset: jax.Array,
    flip: jax.Array,
    *,
    pad_mode: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """Returns images translated, then flipped, and normalized.

    A single pass reads uint8 and writes the network input, without a padded
    copy of the images.

    Args:
      images: (N, H, W, C) uint8.
      rows: (B,) integers, the images to take.
      offset: (B, 2) integers, smaller than H and W in magnitude. Before the
        flip, pixel (y, x) of the result is (y + offset[0], x + offset[1]) of
        the padded image.
      flip: (B,) bool, horizontal flip.
      pad_mode: see `Augmentation`.
      mean, std: see `to_float`.

    Returns:
      (B, H, W, C) float32.

    Source: He et al. (2015), Deep Residual Learning, section 4.2.
    """
    height, width = images.shape[1:3]
    x = jnp.arange(width)
    x = jnp.where(flip[:, None], width - 1 - x, x) + offset[:, 1:]
    y = jnp.arange(height) + offset[:, :1]
    inside = _in_range(y, height), _in_range(x, width)
    if pad_mode == "reflect":
        y, x = _reflect(y, height), _reflect(x, width)
    else:
        y, x = jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)
    pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]]
    pixels = to_float(pixels, mean, std)
    if pad_mode == "reflect":
        return pixels
    return jnp.where(_outer(*inside), pixels, 0)


def cutout(images: jax.Array, corner: jax.Array, side: int) -> jax.Array:
    """Sets a square of each image to zero, the mean.

    Args:
      images: (B, H, W, C) floating, centered.
      corner: (B, 2) integers, first row and column of the square.
      side: side of the square in pixels; 0 returns images unchanged.

    Source: DeVries and Taylor (2017), Improved Regularization of Convolutional
    Neural Networks with Cutout; here the square lies within the image.
    """
    if not side:
        return images
    y, x = (
        _in_range(jnp.arange(size) - corner[:, axis, None], side)
        for axis, size in enumerate(images.shape[1:3])
    )
    return jnp.where(_outer(y, x), 0, images)


def _in_range(index: jax.Array, size: int) -> jax.Array:
    return (index >= 0) & (index < size)


def _outer(y: jax.Array, x: jax.Array) -> jax.Array:
    """Combines masks (B, H) and (B, W) to (B, H, W, 1)."""
    return y[:, :, None, None] & x[:, None, :, None]


def _reflect(index: jax.Array, size: int) -> jax.Array:
    last = size - 1
    return last - jnp.abs(last - jnp.abs(index))
