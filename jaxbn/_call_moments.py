"""The moments of a layer over its calls, stored next to its statistics.

A `Collected` is in the same collection as the running statistics of its layer,
so that scan, vmap, remat and other lifted transforms treat it alike. A layer
that finds one adds the moments of its calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn._moments import merge
from jaxbn._passes import Moments
from jaxbn._running import RunningStats
from jaxbn._state import no_moments, record

Path = tuple[str, ...]

# Name of the variable in batch_stats. An nnx layer inside linen does not have
# it, and ignores it.
NAME = "collected"


class Log:
    """The layers that ran, in order, recorded while tracing.

    Attributes:
      trained: paths of layers that normalized with their batch.
      inferred: paths of layers that normalized with running statistics.
    """

    def __init__(self) -> None:
        # Dicts as ordered sets, since a function may be traced twice.
        self.trained: dict[Path, None] = {}
        self.inferred: dict[Path, None] = {}


@jax.tree_util.register_pytree_node_class
class Collected:
    """Moments of one layer over its calls.

    The log is part of the treedef, and unique for each collection, so that JAX
    does not reuse cached traces and the log is complete.

    Attributes:
      values: Moments of the values; counts have the shape of mean.
      means: Moments of the means of the calls, with weight 1.
      stds: Moments of sqrt(var + epsilon) of the calls, with weight
        var / (var + epsilon), the mean square of the call's output.
    """

    def __init__(
        self,
        values: Moments,
        means: Moments,
        stds: Moments,
        log: Log,
        path: Path,
    ):
        self.values, self.means, self.stds = values, means, stds
        self._log, self._path = log, path

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.values, self.means, self.stds), (self._log, self._path)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Collected:
        return cls(*children, *aux)

    def add(self, batch: Moments, *, epsilon: float) -> Collected:
        """Adds a call that normalized with batch statistics."""
        self._log.trained[self._path] = None
        count = jnp.broadcast_to(batch.count, batch.mean.shape)
        var = batch.m2 / jnp.maximum(count, 1)
        kept = jnp.where(count > 0, 1, jnp.zeros_like(var))
        share = jnp.where(
            var > 0, var / jnp.where(var > 0, var + epsilon, 1), 0
        )
        none = jnp.zeros_like(var)
        return Collected(
            record(self.values, batch),
            merge(self.means, Moments(kept, batch.mean, none)),
            merge(self.stds, Moments(share, jnp.sqrt(var + epsilon), none)),
            self._log,
            self._path,
        )

    def note_inference(self) -> None:
        """Records a call that normalized with running statistics."""
        self._log.inferred[self._path] = None


def empty(running: RunningStats, log: Log, path: Path) -> Collected:
    """Returns an empty Collected for running statistics."""
    nothing = no_moments(running)
    real = nothing._replace(mean=nothing.m2)
    return Collected(nothing, nothing, real, log, path)


def with_empty(batch_stats: Any, log: Log, path: Path = ()) -> Any:
    """Returns batch_stats with an empty Collected next to each mean and var."""
    tree = {
        name: with_empty(below, log, (*path, name))
        for name, below in batch_stats.items()
        if isinstance(below, Mapping)
    }
    if has_statistics(batch_stats) and NAME not in batch_stats:
        running = RunningStats(batch_stats["mean"], batch_stats["var"])
        tree[NAME] = empty(running, log, path)
    return {**batch_stats, **tree}


def collected_variable(layer: nn.Module) -> nn.Variable[Collected] | None:
    """Returns the variable that a linen layer collects moments in.

    Args:
      layer: a bound batch norm layer.

    Returns:
      The variable, or None if moments are not collected.
    """
    if not layer.has_variable("batch_stats", NAME):
        return None
    return layer.variable("batch_stats", NAME)


def has_statistics(node: Any) -> bool:
    """Whether a node has mean and var like a batch norm layer."""
    if not isinstance(node, Mapping) or not {"mean", "var"} <= set(node):
        return False
    both = node["mean"], node["var"]
    # They may also be submodules, or boxed arrays.
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in both):
        return False
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in both)
    return floating and both[0].shape == both[1].shape


def collected(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Collected]]:
    """Yields the path and Collected of each layer."""
    for name, below in tree.items():
        if isinstance(below, Collected):
            yield path, below
        elif isinstance(below, Mapping):
            yield from collected(below, (*path, name))


def nested(found: Mapping[Path, Any]) -> Any:
    """Returns a nested dict; for the path (), the value itself."""
    if () in found:
        return found[()]
    tree: dict[str, Any] = {}
    for path, value in found.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
