"""Sums and products as a rounded float and what rounding took from it.

Compilers turn c - a * b into one operation that does not round the product,
and may do so in one place while they round it in another. What an error term
is taken of must be the same everywhere: here every product is either exact,
so that both ways agree, or ends in `rounded`, which is no multiplication.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b as a rounded sum and what rounding took (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def rounded(x: jax.Array, fewer: int = 1) -> jax.Array:
    """Rounds x to some bits fewer than it has."""
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - fewer)


def two_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a * b as a rounded product and what rounding took (Dekker)."""
    product = rounded(a * b)
    # Halves so short that their products are exact, fused or not.
    half = (jnp.finfo(a.dtype).nmant + 1) // 2
    a_high, b_high = rounded(a, half), rounded(b, half)
    a_low, b_low = a - a_high, b - b_high
    low = (a_high * b_high - product) + a_high * b_low + a_low * b_high
    return product, low + a_low * b_low


def on_grid(
    x: jax.Array, low: jax.Array, bound: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """x + low as a multiple of 2^-bits of a power of two, and the rest.

    The power of two lies above bound >= |x|, and below 4 bound.
    """
    info = jnp.finfo(x.dtype)
    above = 2 * jax.lax.reduce_precision(bound, info.nexp, 0)
    # Added to this, x loses the digits that lie below the grid.
    rounder = above * (1.5 * 2.0 ** (info.nmant - bits))
    leading = (x + rounder) - rounder
    return leading, (x - leading) + low
