"""The running statistics of a model next to a tree of Moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._check_values import check_ddof
from jaxbn._passes import Moments
from jaxbn._running import RunningStats


def map_layers(
    fn: Callable[[Mapping[str, Any], Moments], Any],
    batch_stats: Any,
    moments: Any,
    *,
    names: tuple[str, str],
    path: str = "",
) -> Any:
    """Calls fn for every layer that has Moments.

    Args:
      fn: called with the entries of a layer and its Moments.
      batch_stats: nested mappings, with mean and var for each layer, or
        `RunningStats` in their place.
      moments: a tree of the same structure, or a part of it, with Moments for
        each layer, or {"moments": Moments} as in flax's collection
        batch_moments.
      names: names of both arguments, for error messages.
      path: keys that led to both trees, for error messages.

    Returns:
      Nested dicts like moments, with the result of fn for each layer.

    Raises:
      ValueError: the structures or the shapes do not match.
    """
    mine, theirs = (f"{name}{path}" for name in names)
    if _is_collection(moments) and not _has(batch_stats, "moments"):
        moments = moments["moments"]
    if isinstance(batch_stats, RunningStats):
        batch_stats = batch_stats._asdict()
    if isinstance(moments, Moments):
        if not _has(batch_stats, "mean") or not _has(batch_stats, "var"):
            raise ValueError(
                f"{theirs} has Moments where {mine} has {_keys(batch_stats)}."
            )
        shape, like = np.shape(moments.mean), np.shape(batch_stats["mean"])
        if shape != like:
            raise ValueError(
                f"{theirs} has Moments of shape {shape} where {mine} has a "
                f"mean of shape {like}."
            )
        return fn(batch_stats, moments)
    fits = isinstance(moments, Mapping) and isinstance(batch_stats, Mapping)
    if not fits or not set(moments) <= set(batch_stats):
        raise ValueError(
            f"{theirs} has {_keys(moments)} where {mine} has "
            f"{_keys(batch_stats)}."
        )
    return {
        key: map_layers(
            fn, batch_stats[key], below, names=names, path=f"{path}[{key!r}]"
        )
        for key, below in moments.items()
    }


def replace_entries(batch_stats: Any, new: Any) -> Any:
    """Returns batch_stats with the entries that the nested dict new has."""
    if not isinstance(new, dict):
        return new
    if isinstance(batch_stats, RunningStats):
        return batch_stats._replace(**new)
    new = {k: replace_entries(batch_stats[k], v) for k, v in new.items()}
    return type(batch_stats)({**batch_stats, **new})


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

    new = map_layers(
        replace, batch_stats, stats, names=("batch_stats", "stats")
    )
    return replace_entries(batch_stats, new)


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
    is_mapping = isinstance(tree, Mapping)
    return str(sorted(map(str, tree))) if is_mapping else type(tree).__name__
