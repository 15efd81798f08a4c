"""Batch moments and running statistics of flax.nnx models."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jaxbn._batch_stats import with_statistics
from jaxbn._call import single_argument
from jaxbn._collect_moments import collect_nnx
from jaxbn._model_call import ModelCall
from jaxbn._passes import Moments


def batch_moments(
    model: nnx.Module, *args: Any, call: ModelCall | None = None, **kwargs: Any
) -> dict[str, Moments]:
    """Returns the Moments of the batch of every layer, in training mode.

    A pure function: it calls a copy, with batch norm layers in training mode
    and other layers as in model.

    Args:
      model: a model with jaxbn's batch norm layers; see
        `jaxbn.convert.to_jaxbn`.
      *args: arguments of the call; with `call` only the batch.
      call: (model, batch, train) -> output, with train=True. None calls the
        model with the arguments.
      **kwargs: keyword arguments of the call.

    Returns:
      dict from layer path, such as "blocks/0/norm", to `jaxbn.Moments`, whose
      counts have the shape of mean, in the order of the calls. If a layer is
      called several times, its moments are merged; layers that the call does
      not train are omitted.

    Raises:
      ValueError: a batch norm layer is not of jaxbn, or none was trained.
    """
    copy: Any = nnx.clone(model)
    for layer in batch_norms(copy).values():
        layer.use_running_average = False

    def run() -> None:
        if call is None:
            copy(*args, **kwargs)
        else:
            call(copy, single_argument(args, kwargs), True)

    found, _ = collect_nnx(batch_norms(copy), run)
    return {path: part.values for path, part in found.items()}


def set_statistics(model: nnx.Module, stats: Any, *, ddof: int = 0) -> None:
    """Sets the running statistics of a model's batch norm layers.

    Args:
      model: changed in place.
      stats: dict from layer path to `jaxbn.Moments`, such as
        `jaxbn.precise.recompute` returns.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Raises:
      ValueError: a path or shape does not match; the model is not changed.
    """
    layers = batch_norms(model)
    old = {
        path: {"mean": layer.mean[...], "var": layer.var[...]}
        for path, layer in layers.items()
    }
    new = with_statistics(old, stats, ddof=ddof)
    for path, layer in layers.items():
        layer.mean.set_value(new[path]["mean"])
        layer.var.set_value(new[path]["var"])


def batch_norms(model: nnx.Module) -> dict[str, nnx.BatchNorm]:
    """Returns the batch norm layers of a model, flax's or jaxbn's, by path.

    Args:
      model: any module; not changed.

    Returns:
      dict from layer path, such as "blocks/0/norm", to the layer itself, not a
      copy. A shared layer has only one path.
    """
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
