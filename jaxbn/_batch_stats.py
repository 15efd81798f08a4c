"""Updates the running statistics of a model from a tree of Moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._check_values import check_ddof
from jaxbn._passes import Moments
from jaxbn._running import RunningStats


def update_layers(
    update: Callable[[Mapping[str, Any], Moments], dict[str, Any]],
    batch_stats: Any,
    moments: Any,
    *,
    name: str,
    path: str = "",
) -> Any:
    """Returns batch_stats with the entries of layers that moments has updated.

    Args:
      update: (entries of a layer, Moments) -> its new entries.
      batch_stats: nested mappings, with mean and var for each layer, or
        `RunningStats` in their place.
      moments: a tree of the same structure, or a part of it, with Moments for
        each layer, or {"moments": Moments} as in flax's collection
        batch_moments.
      name: name of the argument moments, for error messages.
      path: keys that led to both trees, for error messages.

    Returns:
      A tree with the structure of batch_stats.

    Raises:
      ValueError: the structures or the shapes do not match.
    """
    if _is_collection(moments) and not _has(batch_stats, "moments"):
        moments = moments["moments"]
    if isinstance(moments, Moments):
        is_tuple = isinstance(batch_stats, RunningStats)
        layer = batch_stats._asdict() if is_tuple else batch_stats
        if not _has(layer, "mean") or not _has(layer, "var"):
            raise ValueError(
                f"{name}{path} has Moments where batch_stats{path} has "
                f"{_keys(batch_stats)}."
            )
        shape, like = np.shape(moments.mean), np.shape(layer["mean"])
        if shape != like:
            raise ValueError(
                f"{name}{path} has Moments of shape {shape} where "
                f"batch_stats{path} has a mean of shape {like}."
            )
        changed = update(layer, moments)
        if is_tuple:
            return batch_stats._replace(**changed)
        return type(layer)({**layer, **changed})
    fits = isinstance(moments, Mapping) and isinstance(batch_stats, Mapping)
    if not fits or not set(moments) <= set(batch_stats):
        raise ValueError(
            f"{name}{path} has {_keys(moments)} where batch_stats{path} has "
            f"{_keys(batch_stats)}."
        )
    changed = {
        key: update_layers(
            update,
            batch_stats[key],
            moments[key],
            name=name,
            path=f"{path}[{key!r}]",
        )
        for key in moments
    }
    return type(batch_stats)({**batch_stats, **changed})


def with_statistics(batch_stats: Any, stats: Any, *, ddof: int = 0) -> Any:
    """Returns batch_stats with mean and variance replaced by those of stats.

    var = m2 / (count - ddof). Other entries of batch_stats, such as step
    counts, are unchanged, and so are channels without values.

    Args:
      batch_stats: nested mappings, with mean and var for each layer, or
        `RunningStats` in their place.
      stats: a tree of the same structure, or a part of it, with Moments for
        each layer, such as Precise.stats for flax.linen.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
      A tree with the structure and dtypes of batch_stats.

    Raises:
      ValueError: the structures or the shapes do not match, or ddof is neither
        0 nor 1.
    """
    check_ddof(ddof)

    def replace(layer: Mapping[str, Any], new: Moments) -> dict[str, Any]:
        known = np.asarray(new.count) > ddof
        var = new.m2 / np.maximum(new.count - ddof, 1)

        def put(name: str, value: Any) -> jax.Array:
            value = np.where(known, value, layer[name])
            return jnp.asarray(value, layer[name].dtype)

        return {"mean": put("mean", new.mean), "var": put("var", var)}

    return update_layers(replace, batch_stats, stats, name="stats")


def _is_collection(tree: Any) -> bool:
    """Whether a tree is the entry of one layer in batch_moments."""
    return (
        isinstance(tree, Mapping)
        and set(tree) == {"moments"}
        and isinstance(tree["moments"], Moments)
    )


def _has(tree: Any, key: str) -> bool:
    return isinstance(tree, Mapping) and key in tree


def _keys(tree: Any) -> str:
    kind = f"{type(tree).__module__}.{type(tree).__name__}"
    return str(sorted(tree)) if isinstance(tree, Mapping) else kind
