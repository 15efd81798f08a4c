"""Image preprocessing and augmentation on the device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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


def crop_and_flip(
    images: jax.Array, keys: jax.Array, *, padding: int, flip: bool
) -> jax.Array:
    """Random crop of the zero-padded image, and random horizontal flip.

    Args:
      images: (B, H, W, C) floating, centered.
      keys: (B,) keys, one per example.
      padding: pixels added on every side; 0 disables cropping.
      flip: flips horizontally with probability 1/2.

    Returns:
      Array of the shape of images.

    Source: He et al. (2015), Deep Residual Learning, section 4.2.
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        for_crop, for_flip = jax.random.split(key)
        if padding:
            pad = ((padding, padding), (padding, padding), (0, 0))
            start = jax.random.randint(for_crop, (2,), 0, 2 * padding + 1)
            image = jax.lax.dynamic_slice(
                jnp.pad(image, pad), (*start, 0), image.shape
            )
        if flip:
            mirrored = jax.random.bernoulli(for_flip)
            image = jnp.where(mirrored, image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, keys)
