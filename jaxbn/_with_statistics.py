"""Puts the mean and variance of Moments where running statistics are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._checks import check_ddof
from jaxbn._passes import Moments


def with_statistics(batch_stats: Any, stats: Any, *, ddof: int = 0) -> Any:
    """Returns batch_stats with the mean and variance of Moments.

    var = m2 / (count - ddof). Everything else in batch_stats, such as a count
    of steps, stays; so does a channel of which nothing was kept.

    Args:
      batch_stats: nested mappings, a layer's with mean and var.
      stats: the same tree, or a part of it, with Moments in place of the
        layers' mappings, as Precise.stats is for flax.linen.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
      The tree of batch_stats, in its dtypes; batch_stats itself stays.

    Raises:
      ValueError: the trees do not fit, or ddof is neither 0 nor 1.
    """
    check_ddof(ddof)
    if isinstance(stats, Moments):
        return _layer_with_statistics(batch_stats, stats, ddof)
    fits = isinstance(batch_stats, Mapping) and isinstance(stats, Mapping)
    if not fits or not set(stats) <= set(batch_stats):
        raise ValueError(
            f"stats has {_list_keys(stats)}, which batch_stats has not; it has "
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
            f"Moments with a mean of shape {np.shape(stats.mean)} do not fit "
            f"{jax.tree.map(np.shape, layer)}."
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
