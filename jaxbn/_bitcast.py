"""Packs arrays of any dtype into rows of one dtype, for one collective."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def to_uint32(leaf: jax.Array) -> jax.Array:
    """Bitcasts a leaf to uint32 (n, k), with zero-padded rows."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    rows = leaf.reshape(leaf.shape[0], -1)
    if jnp.iscomplexobj(rows):
        rows = to_reals(rows, None)
    rows = rows.astype(_stored(rows.dtype))
    size = rows.dtype.itemsize
    if size < 4:
        rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (4 // size))))
        rows = rows.reshape(leaf.shape[0], -1, 4 // size)
    words = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    return words.reshape(leaf.shape[0], -1)


def from_uint32(words: jax.Array, like: jax.Array) -> jax.Array:
    """Inverse of `to_uint32`."""
    n, dtype = like.shape[0], like.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = from_uint32(words, jax.random.key_data(like))
        keys: jax.Array = jax.random.wrap_key_data(
            data, impl=jax.random.key_impl(like)
        )
        return keys
    if jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = jnp.finfo(dtype).dtype
    stored = _stored(dtype)
    if stored.itemsize == 8:
        words = words.reshape(n, -1, 2)
    rows = jax.lax.bitcast_convert_type(words, stored).reshape(n, -1)
    width = math.prod(like.shape[1:])
    if jnp.iscomplexobj(like):
        return from_reals(rows[:, : 2 * width], like)
    return rows[:, :width].astype(dtype).reshape(like.shape)


def _stored(dtype: jnp.dtype) -> jnp.dtype:
    """Returns a dtype of at least one byte that holds the values."""
    stored: Any = dtype
    if dtype == jnp.bool_:
        stored = jnp.uint8
    elif jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        stored = jnp.int8
    elif jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 8:
        stored = jnp.bfloat16
    whole: jnp.dtype = np.dtype(stored)
    return whole


def to_reals(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Flattens a floating or complex leaf to real rows (n, k)."""
    rows = leaf.reshape(leaf.shape[0], -1)
    if jnp.iscomplexobj(rows):
        rows = jnp.concatenate([rows.real, rows.imag], 1)
    return rows if dtype is None else rows.astype(dtype)


def from_reals(rows: jax.Array, like: jax.Array) -> jax.Array:
    """Inverse of `to_reals`."""
    if jnp.iscomplexobj(like):
        rows = rows.astype(jnp.finfo(like.dtype).dtype)
        rows = jax.lax.complex(*jnp.split(rows, 2, 1))
    return rows.astype(like.dtype).reshape(like.shape)
