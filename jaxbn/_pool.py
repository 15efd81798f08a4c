"""Merges the running statistics of replicas that diverged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._axis_names import AxisName, bound_axes
from jaxbn._checks import describe
from jaxbn._moments import merge_stacked, sync
from jaxbn._passes import Centered, Moments
from jaxbn._running import RunningStats


def pool(
    batch_stats: Any,
    *,
    axis_name: AxisName = None,
    counts: jax.Array | None = None,
) -> Any:
    """Merges running statistics of replicas, by the law of total variance.

    With weights w_i = count_i / sum count, mean = sum w_i mean_i and
    var = sum w_i (var_i + |mean_i - mean|^2). Averaging the variances would
    ignore the distance of the means.

    Layers are mappings with mean and var of equal shape, and no other keys than
    those of jaxbn's layers. Other leaves, such as the vector of a spectral norm
    or the count of an observation normalizer, are those of the first replica.

    Args:
      batch_stats: RunningStats, a mapping with mean and var, or a tree of
        these, such as the batch_stats of a flax model. Replicas are stacked on
        axis 0, (R, ...), unless axis_name is given.
      axis_name: in shard_map, pmap or vmap: the named axis or axes of the
        replicas; takes one all-reduce per layer.
      counts: weight of each replica, (R,), or () with axis_name; None weights
        all equally.

    Returns:
      The tree without the axis of replicas. Counters of a layer are the maximum
      over replicas.

    Raises:
      ValueError: axis_name is not bound; a leaf has no axis of replicas, or
        their lengths differ.

    Example:
      >>> replicas = RunningStats(jnp.array([[0.0], [4.0]]), jnp.ones((2, 1)))
      >>> pool(replicas).var.tolist()  # not 1, since the means differ
      [5.0]

    Source: Chan, Golub, LeVeque (1979), Updating Formulae.
    """
    if axis_name is not None:
        names = bound_axes(axis_name)
        if not names:
            raise ValueError(
                f"axis_name={axis_name!r} is not bound here, so there is "
                "nothing to pool over. Call pool inside shard_map, pmap or "
                "vmap, or stack the replicas on axis 0 and omit axis_name."
            )
    else:
        _check_replicas(batch_stats, counts)

    def merged(mean: jax.Array, var: jax.Array) -> Moments:
        if axis_name is not None:
            count = jnp.asarray(1.0 if counts is None else counts, var.dtype)
            return sync(Moments(count, mean, count * var), axis_name=axis_name)
        count = jnp.ones(len(mean)) if counts is None else jnp.asarray(counts)
        count = count.astype(var.dtype)
        m2 = var * count.reshape(-1, *(1,) * (var.ndim - 1))
        parts = Centered(count, mean, jnp.zeros_like(mean), m2)
        return merge_stacked(parts).moments

    def largest(leaf: jax.Array) -> jax.Array:
        if axis_name is not None:
            most: jax.Array = jax.lax.pmax(leaf, names)
            return most
        return jnp.max(leaf, 0)

    def first(leaf: jax.Array) -> jax.Array:
        if axis_name is None:
            return leaf[0]
        leaf = jnp.asarray(leaf)
        wide = leaf.astype(np.int32) if leaf.dtype == bool else leaf
        is_first = jax.lax.axis_index(names) == 0
        # A psum, so that JAX knows it is equal on all devices.
        one: jax.Array = jax.lax.psum(
            jnp.where(is_first, wide, jnp.zeros_like(wide)), names
        )
        return one.astype(leaf.dtype)

    def pooled(node: Any) -> Any:
        if not _is_statistics(node):
            return first(node)
        fields = node._asdict() if isinstance(node, RunningStats) else node
        total = merged(fields["mean"], fields["var"])
        var = total.m2 / total.count
        rest = {k: v for k, v in fields.items() if k not in ("mean", "var")}
        rest = jax.tree.map(largest, rest)
        return type(node)(**{**rest, "mean": total.mean, "var": var})

    return jax.tree.map(pooled, batch_stats, is_leaf=_is_statistics)


# Counters that a layer may have besides mean and var.
_COUNTERS = {"steps", "skipped"}


def _is_statistics(node: Any) -> bool:
    if isinstance(node, RunningStats):
        return True
    if not isinstance(node, Mapping) or not {"mean", "var"} <= set(node):
        return False
    known = set(node) <= {"mean", "var", *_COUNTERS}
    return known and jnp.shape(node["mean"]) == jnp.shape(node["var"])


def _check_replicas(batch_stats: Any, counts: jax.Array | None) -> None:
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(batch_stats)]
    want = {leaf.shape[:1] for leaf in leaves}
    if counts is not None:
        want.add(jnp.shape(counts))
    if len(want) != 1 or () in want:
        found = sorted({describe(leaf) for leaf in leaves})
        raise ValueError(
            "The replicas must be stacked on axis 0 of every leaf, equally "
            f"many, with counts of shape (replicas,) or None; got "
            f"{', '.join(found)} and counts "
            f"{None if counts is None else jnp.shape(counts)}."
        )
