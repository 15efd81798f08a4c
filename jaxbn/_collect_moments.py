"""Collects the batch moments of all layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxbn._call import uses_running_average
from jaxbn._call_moments import (
    NAME,
    Collected,
    Log,
    Path,
    collected,
    empty,
    with_empty,
)
from jaxbn._running import RunningStats


def collect_linen(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> tuple[Any, dict[Path, Collected], Log]:
    """Returns the output of a model and the moments of its trained layers.

    Args:
      model: see `jaxbn.linen.batch_moments`.
      variables: variables of the model.
      *args, **kwargs: arguments of apply, including mutable.

    Returns:
      The output; a dict from layer path to `Collected`, in the order of the
      calls; and the `Log` of the calls.

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
    """Returns the moments of the layers that run trains.

    Args:
      layers: batch norm layers of a model by path; changed in place.
      run: calls the model.

    Returns:
      dict from layer path to `Collected`, in the order of the calls, and the
      `Log` of the calls.

    Raises:
      ValueError: a layer is not of jaxbn, or none was trained.
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
    """A BatchStat, so that nnx.vmap and nnx.scan treat it like mean and var."""


def no_moments_message(
    silent: dict[Path, str], log: Log, batch_stats: Any
) -> str:
    """Returns an error message that explains why there are no moments.

    Args:
      silent: flax layers that were trained, with the package of each.
      log: log of the call.
      batch_stats: batch_stats that the model was called with.
    """
    if silent:
        kinds = {package: None for package in silent.values()}
        return (
            f"{_listed(silent)}: {' and '.join(kinds)}.BatchNorm does not "
            "return moments. Convert it with jaxbn.convert.to_jaxbn(model)."
        )
    how = (
        "Set training mode, for example by train=True, or by "
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
            "called, although batch_stats has a mean and var of "
            f"{_listed(known)}. If that is your own class, derive it from "
            f"jaxbn's BatchNorm; if it is not called in training: {how}"
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
