"""Replaces running statistics by the mean and variance of Moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._check_values import check_ddof
from jaxbn._passes import Moments


def with_statistics(batch_stats: Any, stats: Any, *, ddof: int = 0) -> Any:
    """Returns batch_stats with mean and variance replaced by those of stats.

    var = m2 / (count - ddof). Other entries of batch_stats, such as step
    counts, are unchanged, and so are channels without values.

    Args:
      batch_stats: nested mappings, with mean and var for each layer.
      stats: a tree of the same structure, or a part of it, with Moments for
        each layer, such as Precise.stats for flax.linen.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
      A tree with the structure and dtypes of batch_stats.

    Raises:
      ValueError: the structures do not match, or ddof is neither 0 nor 1.
    """
    check_ddof(ddof)
    if isinstance(stats, Moments):
        return _layer_with_statistics(batch_stats, stats, ddof)
    fits = isinstance(batch_stats, Mapping) and isinstance(stats, Mapping)
    if not fits or not set(stats) <= set(batch_stats):
        raise ValueError(
            f"stats has {_list_keys(stats)}, but batch_stats has "
            f"{_list_keys(batch_stats)}."
        )
    changed = {
        name: with_statistics(batch_stats[name], stats[name], ddof=ddof)
        for name in stats
    }
    return type(batch_stats)({**batch_stats, **changed})


def _layer_with_statistics(
    layer: Mapping[str, Any], stats: Moments, ddof: int
) -> Mapping[str, Any]:
    fits = isinstance(layer, Mapping) and {"mean", "var"} <= set(layer)
    if not fits or np.shape(layer["mean"]) != np.shape(stats.mean):
        raise ValueError(
            f"Moments with a mean of shape {np.shape(stats.mean)} do not match "
            f"a layer of shapes {jax.tree.map(np.shape, layer)}."
        )
    known = np.asarray(stats.count) > ddof
    var = stats.m2 / np.maximum(stats.count - ddof, 1)

    def put(name: str, value: Any) -> jax.Array:
        value = np.where(known, value, layer[name])
        return jnp.asarray(value, layer[name].dtype)

    new = {"mean": put("mean", stats.mean), "var": put("var", var)}
    mapping: Any = type(layer)
    changed: Mapping[str, Any] = mapping({**layer, **new})
    return changed


def _list_keys(tree: Any) -> str:
    return ", ".join(map(str, tree)) if isinstance(tree, Mapping) else "none"
