"""Arithmetic helpers: dtype promotion, optional operands, squares."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def hide_from_cse(statistics: Any) -> Any:
    """Returns the same values, hidden from common subexpression elimination.

    An elementwise expression of x and statistics that is used twice is then
    recomputed instead of stored: arithmetic is cheaper than memory traffic.
    """
    return jax.lax.optimization_barrier(statistics)


def nonzero(count: Any) -> Any:
    """Returns count, with 0 replaced by 1 to divide by; keeps numpy arrays."""
    if isinstance(count, np.ndarray):
        return np.where(count > 0, count, count.dtype.type(1))
    return jnp.where(count > 0, count, 1)


def promoted(*values: Any) -> Any:
    """Casts values to a common dtype, for `widen`ed values.

    Explicit casts also work under `jax_numpy_dtype_promotion="strict"`.
    """
    dtypes = [value.dtype for value in values]
    dtype = functools.reduce(np.promote_types, dtypes)
    return [value.astype(dtype) for value in values]


def times(a: jax.Array, b: jax.Array | None) -> jax.Array:
    """Returns a * b, where None stands for 1."""
    if b is None:
        return a
    a, b = promoted(a, b)
    return a * b


def plus(a: jax.Array, b: jax.Array | None) -> jax.Array:
    """Returns a + b, where None stands for 0."""
    if b is None:
        return a
    a, b = promoted(a, b)
    return a + b


def wide_dtype(dtype: Any) -> np.dtype:
    """Returns float32, or dtype if it is wider; float32 for integers."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.dtype(np.float32)
    return np.promote_types(dtype, np.float32)


def widen(x: jax.Array) -> jax.Array:
    """Returns x in float32 or wider."""
    return x.astype(wide_dtype(x.dtype))


def abs2(x: jax.Array) -> jax.Array:
    """Returns |x|^2, which is real."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the elementwise real inner product, Re(a conj(b))."""
    return (a * b.conj()).real if jnp.iscomplexobj(a) else a * b
