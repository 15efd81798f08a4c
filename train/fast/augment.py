"""Flips, translations and cutout, as functions of (seed, epoch, example).

Random numbers are drawn for a whole epoch at once, in few kernel launches, and
pixels are gathered per batch: a single pass reads uint8 and writes the network
input, without another copy of the images.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.augment import example_keys

FLIPS = ("alternating", "random", "none")


class Augmentation(NamedTuple):
    """Augmentation parameters; leading axes are shared by all fields."""

    flip: jax.Array  # (...) bool, horizontal flip
    offset: jax.Array  # (..., 2) int32, source of pixel (0, 0)
    corner: jax.Array  # (..., 2) int32, first row and column of the cutout


def draw(
    key: jax.Array,
    index: jax.Array,
    epoch: jax.Array,
    *,
    flip: str,
    translate: int,
    last_corner: tuple[int, int],
) -> Augmentation:
    """Samples the augmentation of each example for an epoch.

    Args:
      key: key of the run.
      index: (N,) integers, indices into the training split.
      epoch: (), from 0.
      flip: "alternating" flips at random in the first epoch, and then every
        other epoch, so that two epochs show both. "random" flips at random in
        every epoch. "none" never flips.
      translate: maximum offset in pixels.
      last_corner: maximum row and column of the cutout's corner.

    Returns:
      Augmentation with fields (N, ...).

    Source: Jordan (2024), for the alternation.
    """
    for_flips, for_epochs = jax.random.split(key)
    keys = example_keys(jax.random.fold_in(for_epochs, epoch), index)

    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        first, second, third = jax.random.split(key, 3)
        limit = jnp.array(last_corner) + 1
        return (
            jax.random.bernoulli(first),
            jax.random.randint(second, (2,), -translate, translate + 1),
            jax.random.randint(third, (2,), 0, limit),
        )

    mirrored, offset, corner = jax.vmap(one)(keys)
    if flip == "alternating":
        at_first = jax.vmap(jax.random.bernoulli)(
            example_keys(for_flips, index)
        )
        mirrored = at_first ^ (epoch % 2 == 1)
    elif flip == "none":
        mirrored = jnp.zeros_like(mirrored)
    return Augmentation(mirrored, offset, corner)


def flip_and_translate(
    images: jax.Array, index: jax.Array, flip: jax.Array, offset: jax.Array
) -> jax.Array:
    """Returns images flipped, then translated with reflection padding.

    Pixel (y, x) of the result is (y + offset[0], x + offset[1]) of the flipped
    image. Padding is as numpy's "reflect", without repeating the border.

    Args:
      images: (N, H, W, C).
      index: (B,) integers, the images to take.
      flip: (B,) bool.
      offset: (B, 2) integers, smaller than H and W in magnitude.

    Returns:
      (B, H, W, C) of the dtype of images.
    """
    height, width = images.shape[1:3]
    y = _reflect(jnp.arange(height) + offset[:, :1], height)
    x = _reflect(jnp.arange(width) + offset[:, 1:], width)
    x = jnp.where(flip[:, None], width - 1 - x, x)
    return images[index[:, None, None], y[:, :, None], x[:, None, :]]


def _reflect(indices: jax.Array, size: int) -> jax.Array:
    last = size - 1
    return last - jnp.abs(last - jnp.abs(indices))


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
    inside = []
    for axis in range(2):
        index = jnp.arange(images.shape[1 + axis]) - corner[:, axis, None]
        inside.append((index >= 0) & (index < side))
    square = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(square, 0, images)
