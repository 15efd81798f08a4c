"""Leaves of a pytree as numbers and names for comparison."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def widest(x: Any) -> np.ndarray:
    x = np.asarray(x)
    wide: np.ndarray = x.astype(complex if np.iscomplexobj(x) else np.float64)
    return wide


def without_keys(x: Any) -> Any:
    """The words of a typed random key; anything else as an array."""
    if jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x if isinstance(x, jax.Array) else np.asarray(x)


def path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
