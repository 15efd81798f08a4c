"""Test-time augmentation: the mean over views of an image."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from train.augment import crop_and_flip
from train.recipe import Recipe

# Offset and weight of each view. Source: Jordan (2024), airbench.
VIEWS = (((0, 0), 0.5), ((-1, -1), 0.25), ((1, 1), 0.25))


def view_logits(
    recipe: Recipe, variables: Any, images: jax.Array, rows: jax.Array
) -> jax.Array:
    """Returns the logits of all test-time views, (3, 2, B, classes).

    Axis 0 is VIEWS, axis 1 the image and its flip, which is omitted if
    training does not flip. Calls the network once.
    """
    flips = (False,) if recipe.augmentation.flip == "none" else (False, True)
    size = len(rows)
    views = [
        crop_and_flip(
            images,
            rows,
            jnp.broadcast_to(jnp.array(offset), (size, 2)),
            jnp.full(size, flip),
            pad_mode="reflect",
            mean=recipe.pixel_mean,
            std=recipe.pixel_std,
        )
        for offset, _ in VIEWS
        for flip in flips
    ]
    logits = recipe.model.apply(variables, jnp.concatenate(views), train=False)
    return logits.reshape(len(VIEWS), len(flips), size, -1)


def mean_logits(views: jax.Array) -> jax.Array:
    """Returns the weighted mean of `view_logits`, (B, classes)."""
    weights = jnp.array([weight for _, weight in VIEWS]) / views.shape[1]
    return jnp.einsum("vfbk,v->bk", views, weights)
