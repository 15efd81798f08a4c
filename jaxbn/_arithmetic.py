"""Arithmetic on values and statistics: casts, squares, what is None."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def hide_from_cse(statistics: Any) -> Any:
    """Returns the same values, which compilers take for others.

    What x and a statistic make in two places is then computed in both, and not
    once, stored and read again: arithmetic is cheap and memory traffic is not.
    """
    return jax.lax.optimization_barrier(statistics)


def nonzero(count: Any) -> Any:
    """Returns count with 1 for 0, to divide by; static where count is."""
    if isinstance(count, np.ndarray):
        return np.where(count > 0, count, count.dtype.type(1))
    return jnp.where(count > 0, count, 1)


def promoted(*values: Any) -> Any:
    """Returns values cast to the dtype of their product; all are wide.

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


def widen(x: jax.Array) -> jax.Array:
    """Returns x in float32 or wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def abs2(x: jax.Array) -> jax.Array:
    """Returns |x|^2, which is real."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the real inner product of two numbers."""
    return (a * b.conj()).real if jnp.iscomplexobj(a) else a * b
