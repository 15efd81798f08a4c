"""Computes filters that whiten image patches from the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SIDE = 2  # height and width of a patch


def patches(images: jax.Array) -> jax.Array:
    """Returns all overlapping patches.

    Args:
      images: (N, H, W, C) floating.

    Returns:
      (N (H - 1) (W - 1), 4 C), with row, column and channel of the patch in
      row-major order.
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

    With the second moments M = V diag(e) V^T of the patches, these are
    V / sqrt(e + epsilon), largest e first, and their negatives, so that no
    information is lost in a GELU. The mean is not subtracted, since it is about
    zero.

    Args:
      images: (N, H, W, C) float32, of standard deviation about 1.
      epsilon: squared unit of images; bounds the filters of directions with
        little variance.

    Returns:
      (2, 2, C, 8 C) float32, as `nn.Conv` has its kernel.

    Source: Page (2019), How to Train Your ResNet 8, with both signs as in
    Jordan (2024).
    """
    rows = patches(images)
    # Accelerators may compute float32 products in lower precision.
    products = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    values, vectors = jnp.linalg.eigh(products / len(rows))
    # Eigenvalues that are zero can be slightly negative by rounding.
    scale = jax.lax.rsqrt(jnp.maximum(values, 0) + epsilon)
    filters = (vectors * scale)[:, ::-1]
    both = jnp.concatenate([filters, -filters], axis=1)
    return both.reshape(SIDE, SIDE, images.shape[-1], -1)
