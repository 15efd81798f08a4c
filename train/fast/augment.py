"""Flips, translations and cutout, as functions of (seed, epoch, example).

What is random is drawn for a whole epoch at once, a handful of launches, and
the pixels are gathered batch by batch: one pass reads uint8 and writes what the
network takes, and no second copy of the images is made, written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.augment import example_keys

FLIPS = ("alternating", "random", "none")


class Augmentation(NamedTuple):
    """What to do with examples; the fields begin with the same axes."""

    flip: jax.Array  # (...) bool, mirrors left and right
    offset: jax.Array  # (..., 2) int32, what comes to the place of (0, 0)
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
    """Draws what happens to each example in an epoch.

    Args:
      key: of the run.
      index: (N,) integers, places in the training split.
      epoch: (), from 0.
      flip: "alternating": in the first epoch by chance, then every image
        mirrored or not in turns, so that two epochs show both. "random": by
        chance every time. "none".
      translate: offsets are from -translate to translate.
      last_corner: largest row and column that a cutout begins at.

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
    """Returns images mirrored, and then moved with the border reflected.

    Pixel (y, x) of a result is (y + offset[0], x + offset[1]) of the mirrored
    image. The outermost pixels are not repeated, as numpy's "reflect".

    Args:
      images: (N, H, W, C).
      index: (B,) integers, which to take.
      flip: (B,) bool.
      offset: (B, 2) integers, less than H and W in size.

    Returns:
      (B, H, W, C) of the dtype of images.
    """
    height, width = images.shape[1:3]
    y = _reflected(jnp.arange(height) + offset[:, :1], height)
    x = _reflected(jnp.arange(width) + offset[:, 1:], width)
    x = jnp.where(flip[:, None], width - 1 - x, x)
    return images[index[:, None, None], y[:, :, None], x[:, None, :]]


def _reflected(places: jax.Array, size: int) -> jax.Array:
    last = size - 1
    return last - jnp.abs(last - jnp.abs(places))


def cutout(images: jax.Array, corner: jax.Array, side: int) -> jax.Array:
    """Sets a square of each image to zero, which is the mean (cutout).

    Args:
      images: (B, H, W, C) floating, centred.
      corner: (B, 2) integers, its first row and column.
      side: of the square, in pixels; 0 changes nothing.

    Source: DeVries and Taylor (2017), Improved Regularization of Convolutional
    Neural Networks with Cutout; here the square lies within the image.
    """
    if not side:
        return images
    inside = []
    for axis in range(2):
        place = jnp.arange(images.shape[1 + axis]) - corner[:, axis, None]
        inside.append((place >= 0) & (place < side))
    square = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(square, 0, images)
