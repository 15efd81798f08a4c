"""Running statistics of replicas that went apart, merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._checks import AxisName, bound_axes, describe
from jaxbn._moments import merge_stacked, sync
from jaxbn._passes import Centered, Moments
from jaxbn._running import RunningStats


def pool(
    batch_stats: Any,
    *,
    axis_name: AxisName = None,
    counts: jax.Array | None = None,
) -> Any:
    """Merges running statistics that went apart, by the law of total variance.

    With weights w_i = count_i / sum count, mean = sum w_i mean_i and
    var = sum w_i (var_i + |mean_i - mean|^2). The average of the variances
    alone leaves out how far the means lie apart.

    What is no batch norm's, such as the vector of a spectral norm or the count
    of an observation normalizer, has no such law: it is that of the first
    replica. A layer is a mapping with mean and var of one shape, and of other
    names no more than those of jaxbn's layer.

    Args:
      batch_stats: RunningStats, a mapping with mean and var, or any tree of
        these, such as flax's batch_stats of a whole model. The replicas are
        stacked on axis 0, (R, ...), unless axis_name is given.
      axis_name: in shard_map, pmap or vmap: the named axis, or axes, on which
        the replicas lie; one all-reduce a layer.
      counts: weight of each replica, (R,), or with axis_name () on each; None
        weighs all equally.

    Returns:
      The same tree, without the axis of the replicas. Of the counters of a
      layer, the largest.

    Raises:
      ValueError: axis_name is not bound; a leaf has no axis of replicas, or
        lengths differ.

    Example:
      >>> replicas = RunningStats(jnp.array([[0.0], [4.0]]), jnp.ones((2, 1)))
      >>> pool(replicas).var.tolist()  # not 1: the means lie apart
      [5.0]

    Source: Chan, Golub, LeVeque (1979), Updating Formulae.
    """
    if axis_name is not None:
        names = bound_axes(axis_name)
        if not names:
            raise ValueError(
                f"axis_name={axis_name!r} is not bound here, so there is "
                "nothing to pool over. Call pool inside shard_map, pmap or "
                "vmap, or stack the replicas on axis 0 and leave it out."
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
        # A sum, which JAX knows to be the same on all devices.
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


# What a layer counts beside its mean and var.
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
