"""Moments that the layers of a model hand out, wherever they lie in it.

A `Collected` is put beside the running statistics of a layer, in the same
collection. It goes with them through scan, vmap, remat and what else lifts
the collection, and a layer that finds one adds the moments of its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._call import uses_running_average
from jaxbn._moments import merge
from jaxbn._passes import Moments
from jaxbn._running import RunningStats
from jaxbn._state import no_moments, record

Path = tuple[str, ...]

# Of the variable in batch_stats. A layer of nnx inside of linen has none of
# the name, and takes no notice.
NAME = "collected"


class Log:
    """Which layers ran, noted while they are traced, in order.

    Attributes:
      trained: paths of layers that normalized with their batch.
      inferred: paths of layers that normalized with running statistics.
    """

    def __init__(self) -> None:
        # Dictionaries, because they keep the order. A body may be traced twice.
        self.trained: dict[Path, None] = {}
        self.inferred: dict[Path, None] = {}


@jax.tree_util.register_pytree_node_class
class Collected:
    """Moments of one layer over its calls.

    The log is a part of the type, and each collection has its own: what JAX
    has traced for another one is then not reused, and the log is complete.

    Attributes:
      values: Moments of the values; counts have the shape of mean.
      means: Moments of the calls' means, each of them one value.
      stds: Moments of the calls' sqrt(var + epsilon), which weigh
        var / (var + epsilon) each: the mean square of the call's output.
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
        """Adds a call that normalized with its batch."""
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
        """Notes a call that normalized with the running statistics."""
        self._log.inferred[self._path] = None


def empty(running: RunningStats, log: Log, path: Path) -> Collected:
    """Returns the Collected of no call, an entry for each statistic."""
    nothing = no_moments(running)
    real = nothing._replace(mean=nothing.m2)
    return Collected(nothing, nothing, real, log, path)


def with_empty(batch_stats: Any, log: Log, path: Path = ()) -> Any:
    """Returns batch_stats with an empty Collected beside each mean and var."""
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
    """Returns the variable that a linen layer hands out moments in.

    Args:
      layer: a bound batch norm layer.

    Returns:
      The variable; None where nobody collects.
    """
    if not layer.has_variable("batch_stats", NAME):
        return None
    return layer.variable("batch_stats", NAME)


def has_statistics(node: Any) -> bool:
    """Whether a node has a mean and a var that may be a batch norm layer's."""
    if not isinstance(node, Mapping) or not {"mean", "var"} <= set(node):
        return False
    both = node["mean"], node["var"]
    # A submodule may have the name, and a box may hold the array.
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in both):
        return False
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in both)
    return floating and both[0].shape == both[1].shape


def collected(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Collected]]:
    """Yields what the layers of a tree of with_empty have returned."""
    for name, below in tree.items():
        if isinstance(below, Collected):
            yield path, below
        elif isinstance(below, Mapping):
            yield from collected(below, (*path, name))


def nested(found: Mapping[Path, Any]) -> Any:
    """Returns a tree of dicts; of a layer alone, what it has."""
    if () in found:
        return found[()]
    tree: dict[str, Any] = {}
    for path, value in found.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def collect_linen(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> tuple[Any, dict[Path, Collected], Log]:
    """Returns the output of a model, and what the trained layers hand out.

    Args:
      model: see `jaxbn.linen.batch_moments`.
      variables: of the model.
      *args, **kwargs: of apply, with the collections that are mutable.

    Returns:
      The output; a dict from the path of a layer to `Collected`, in the order
      of the calls; and the `Log` of the calls.

    Raises:
      ValueError: see `jaxbn.linen.batch_moments`.
    """
    log = Log()
    stats = with_empty(nn.unbox(variables.get("batch_stats", {})), log)
    flax: dict[Path, None] = {}

    def watch(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, called = context.module, context.method_name == "__call__"
        theirs = called and isinstance(layer, nn.BatchNorm)
        if theirs and not uses_running_average(layer, *args, **kwargs):
            flax[layer.path] = None
        return run(*args, **kwargs)

    with nn.intercept_methods(watch):
        y, updates = model.apply(
            {**variables, "batch_stats": stats}, *args, **kwargs
        )
    silent = {path: "flax.linen" for path in flax if path not in log.trained}
    if silent or not log.trained:
        raise ValueError(no_moments_message(silent, log, stats))
    found = dict(collected(updates["batch_stats"]))
    return y, {path: found[path] for path in log.trained}, log


def collect_nnx(
    layers: Mapping[str, nnx.BatchNorm], run: Callable[[], None]
) -> tuple[dict[str, Collected], Log]:
    """Returns what those of the layers that run trains hand out.

    Args:
      layers: of a copy of a model that belongs to the caller, by path.
      run: calls the copy.

    Returns:
      dict from the path of a layer to `Collected`, in the order of the calls;
      and the `Log` of the calls.

    Raises:
      ValueError: a layer is not jaxbn's, or none was trained.
    """
    log = Log()
    ours: dict[str, Any] = {
        path: layer
        for path, layer in layers.items()
        if hasattr(layer, "moments")
    }
    silent: dict[Path, str] = {
        (path,): "flax.nnx" for path in layers if path not in ours
    }
    if silent:
        raise ValueError(no_moments_message(silent, log, {}))
    for path, layer in ours.items():
        running = RunningStats(layer.mean[...], layer.var[...])
        layer.moments = _CollectedStat(empty(running, log, (path,)))
    run()
    found = {path: layer.moments.get_value() for path, layer in ours.items()}
    if not log.trained:
        known = {path: {NAME: part} for path, part in found.items()}
        raise ValueError(no_moments_message({}, log, known))
    return {path: found[path] for (path,) in log.trained}, log


class _CollectedStat(nnx.BatchStat[Collected]):
    """Goes where mean and var of its layer go, in nnx.vmap and nnx.scan."""


def no_moments_message(
    silent: dict[Path, str], log: Log, batch_stats: Any
) -> str:
    """Returns why there are no moments, and what to do.

    Args:
      silent: layers of flax that were trained, with the package of each.
      log: of the call.
      batch_stats: that the model was called with.
    """
    if silent:
        kinds = {package: None for package in silent.values()}
        return (
            f"{_listed(silent)}: {' and '.join(kinds)}.BatchNorm hands out no "
            "moments. jaxbn.convert.to_jaxbn(model) makes it jaxbn's."
        )
    how = (
        "Put it into training mode, such as train=True, or "
        "call=lambda model, batch, train: model(batch, mode=train)."
    )
    if log.inferred:
        return (
            "No layer returned moments: in this call the model is in "
            f"inference mode, in {_listed(log.inferred)}. {how}"
        )
    known = [path for path, _ in collected(batch_stats)]
    if known:
        return (
            "No layer returned moments: no batch norm layer of jaxbn was "
            f"called, although batch_stats has a mean and a var of "
            f"{_listed(known)}. If that is a class of your own, derive it from "
            f"jaxbn's BatchNorm; if the call does not reach it: {how}"
        )
    return (
        "No layer returned moments: there is no batch norm layer of flax or "
        "jaxbn in the model, and no mean and var in its batch_stats."
    )


def _listed(paths: Iterable[Path]) -> str:
    names = ["/".join(map(str, path)) or "the model itself" for path in paths]
    return ", ".join(names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
