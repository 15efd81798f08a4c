"""Batch moments of a flax.linen model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax.linen as nn

from jaxbn._call import linen_options, single_argument
from jaxbn._call_moments import nested
from jaxbn._collect_moments import collect_linen
from jaxbn._model_call import ModelCall, make_model_call


def batch_moments(
    model: nn.Module,
    variables: Any,
    *args: Any,
    call: ModelCall | None = None,
    rngs: Any = None,
    mutable: Collection[str] = (),
    **kwargs: Any,
) -> Any:
    """Returns the Moments of the batch of every layer, in training mode.

    A pure function that does not update running statistics. If a layer is
    called several times, its moments are merged. Layers in nn.scan or nn.vmap
    have moments with the axis of their running statistics.

    Args:
      model: a model with jaxbn's batch norm layers; see
        `jaxbn.convert.to_jaxbn`.
      variables: variables of the model.
      *args: arguments of the call; with `call` only the batch.
      call: (model, batch, train) -> output, with a bound model, as for `method`
        in flax, and train=True. None calls the model with the arguments.
      rngs: a key or a dict of keys. None creates a key for every stream.
      mutable: names of collections that the call creates. Collections in
        variables are mutable already, except for params.
      **kwargs: keyword arguments of the call, including those that set training
        mode, such as train=True.

    Returns:
      The tree of batch_stats with `jaxbn.Moments` for each layer; counts have
      the shape of mean. Layers that the call does not train are omitted, such
      as those in inference mode or in a branch not taken; in a branch of
      nn.cond, counts are zero. Other entries of batch_stats are omitted.

    Raises:
      ValueError: no layer returned moments, or a flax layer was trained.
    """
    if call is not None:
        batch = single_argument(args, kwargs)
        args, kwargs = (batch, True), {"method": make_model_call(model, call)}
    kwargs.update(linen_options(variables, rngs, mutable))
    _, found, _ = collect_linen(model, variables, *args, **kwargs)
    return nested({path: part.values for path, part in found.items()})
