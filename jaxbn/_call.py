"""Calls flax.linen and flax.nnx models in training or inference mode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxbn._model_call import ModelCall, make_model_call


def linen_options(
    variables: Mapping[str, Any],
    rngs: Any,
    mutable: Collection[str],
    *,
    number: Any = None,
) -> dict[str, Any]:
    """Returns mutable and rngs to apply a linen model in training.

    Args:
      variables: variables of the model; all collections except params are
        mutable.
      rngs: a key or a dict of keys. None creates a key for every stream, since
        flax falls back to the stream "params".
      mutable: names of additional collections.
      number: batch number to fold into the keys; None does not.

    Returns:
      dict of the keyword arguments.
    """
    if rngs is None:
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    if number is not None:
        rngs = jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs)
    if isinstance(mutable, str):
        mutable = (mutable,)
    written = [name for name in variables if name != "params"]
    return dict(rngs=rngs, mutable=sorted({"batch_stats", *written, *mutable}))


def single_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the only argument; raises ValueError for any others."""
    if len(args) != 1 or kwargs:
        names = [*map(str, range(len(args))), *kwargs]
        raise ValueError(
            "With call=, pass the batch as the only argument, and call passes "
            f"its parts to the model; got arguments "
            f"{', '.join(names) or 'none'}. Put them into a tuple or a dict."
        )
    return args[0]


def uses_running_average(
    layer: Any,
    x: Any,
    use_running_average: bool | None = None,
    **_: Any,
) -> bool:
    """Whether a call of a batch norm layer uses the running statistics.

    Args:
      layer: a layer of flax or jaxbn.
      x: its input.
      use_running_average: argument of the call.
    """
    if use_running_average is None:
        use_running_average = layer.use_running_average
    return bool(use_running_average)


def check_nnx_options(rngs: Any, mutable: Collection[str]) -> None:
    """Raises ValueError if options for linen are given for an nnx model."""
    if rngs is not None or mutable:
        name = "rngs" if rngs is not None else "mutable"
        raise ValueError(
            f"{name}= is for flax.linen. A flax.nnx model holds its random "
            "streams and all its state; set them in the model, or in call."
        )


def advance_streams(model: Any, number: Any) -> None:
    """Advances the random streams of an nnx model, for each batch differently.

    Args:
      model: changed in place.
      number: batch number.
    """
    for _, count in nnx.iter_graph(model):
        if isinstance(count, nnx.RngCount):
            value = count.get_value()
            # More than the calls of one batch advance it.
            count.set_value(value + (number * 2**16).astype(value.dtype))


def call_nnx_clone(
    model: Any, call: ModelCall, batch: Any, train: bool
) -> tuple[Any, Any]:
    """Calls a clone of an nnx model; returns its output and the clone."""
    copy = nnx.clone(model)
    copy.train() if train else copy.eval()
    return call(copy, batch, train), copy


def pure(
    model: Any,
    variables: Any,
    *,
    call: ModelCall | None = None,
    rngs: Any = None,
    mutable: Collection[str] = (),
) -> tuple[Callable[..., tuple[Any, Any]], Any]:
    """Returns a model as a pure function, and its variables.

    Args:
      model: a linen or nnx module.
      variables: variables of a linen model; None for nnx.
      call: see `make_model_call`.
      rngs: see `linen_options`.
      mutable: see `linen_options`.

    Returns:
      (apply, variables): apply(variables, batch, train=True) -> (output, new
      variables). For linen, variables are collections; for nnx, the nnx.State
      without random streams, which restart in each call.

    Raises:
      ValueError: see `make_model_call`; rngs or mutable are given for an nnx
        model.
    """
    run = make_model_call(model, call)
    if isinstance(model, nn.Module):

        def apply(variables: Any, batch: Any, train: bool = True) -> Any:
            options = linen_options(variables, rngs, mutable)
            if not train:
                options["mutable"] = list(mutable)
            return model.apply(variables, batch, train, method=run, **options)

        return apply, variables
    check_nnx_options(rngs, mutable)
    parts: tuple[Any, ...] = nnx.split(model, nnx.RngState, ...)
    graphdef, streams, state = parts

    def apply_nnx(state: Any, batch: Any, train: bool = True) -> Any:
        merged = nnx.merge(graphdef, streams, state)
        output, copy = call_nnx_clone(merged, run, batch, train)
        return output, nnx.state(copy, nnx.Not(nnx.RngState))

    return apply_nnx, state
