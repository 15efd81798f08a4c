"""A first layer that whitens patches of images, computed from the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SIDE = 2  # pixels of a patch in either direction


def patches(images: jax.Array) -> jax.Array:
    """Returns all patches, which overlap.

    Args:
      images: (N, H, W, C) floating.

    Returns:
      (N (H - 1) (W - 1), 4 C): row, column and channel in the patch, in this
      order, the last changing fastest.
    """
    height, width = (size - SIDE + 1 for size in images.shape[1:3])
    shifted = [
        images[:, y : y + height, x : x + width]
        for y in range(SIDE)
        for x in range(SIDE)
    ]
    stacked = jnp.stack(shifted, axis=-2)
    return stacked.reshape(-1, SIDE * SIDE * images.shape[-1])


def whitening_kernel(images: jax.Array, *, epsilon: float) -> jax.Array:
    """Returns filters whose outputs are uncorrelated, each with both signs.

    With the second moments of the patches M = V diag(e) V^T these are
    V / sqrt(e + epsilon) and the negative of it, largest e first: a GELU after
    them loses nothing. The mean is not subtracted, as that of the images is
    about zero.

    Args:
      images: (N, H, W, C) float32, of standard deviation about 1.
      epsilon: in the square of that unit; bounds the filters where there is
        hardly any variance.

    Returns:
      (2, 2, C, 8 C) float32, as `nn.Conv` has its kernel.

    Source: Page (2019), How to Train Your ResNet 8, with both signs as in
    Jordan (2024).
    """
    rows = patches(images)
    # On some accelerators a float32 product is rounded much further.
    products = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    values, vectors = jnp.linalg.eigh(products / len(rows))
    # Rounding can leave what is zero a little below.
    scale = jax.lax.rsqrt(jnp.maximum(values, 0) + epsilon)
    filters = (vectors * scale)[:, ::-1]
    both = jnp.concatenate([filters, -filters], axis=1)
    return both.reshape(SIDE, SIDE, images.shape[-1], -1)
