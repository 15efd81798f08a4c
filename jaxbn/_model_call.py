"""Determines how to call a model in training or inference mode."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
from flax import errors, nnx

# (model, batch, train) -> output. A linen model is bound.
ModelCall = Callable[[Any, Any, bool], Any]

# Names of the argument or field that sets the mode of a model.
_TRAINING = ("train", "training", "is_training")
_INFERENCE = ("use_running_average", "deterministic", "eval", "inference")


def make_model_call(model: Any, call: ModelCall | None) -> ModelCall:
    """Returns call, or a default that sets the mode by its name.

    Args:
      model: a linen or nnx module.
      call: (model, batch, train) -> output, or None.

    Returns:
      A function (model, batch, train) -> output; for linen, to pass as `method`
      to apply.

    Raises:
      ValueError: model is not a flax module; or call is None, and the model
        takes other arguments than the batch, or, for linen, has no mode.
    """
    if not isinstance(model, (nn.Module, nnx.Module)):
        raise ValueError(
            "model must be a flax.linen or flax.nnx module; got "
            f"{'the class ' * isinstance(model, type)}"
            f"{getattr(model, '__name__', type(model).__name__)}."
        )
    linen = isinstance(model, nn.Module)
    if call is not None:
        return _with_option_hints(call) if linen else call
    signature = inspect.signature(type(model).__call__)
    known = list(signature.parameters)
    argument = _find_mode(known)
    field = None
    if argument is None and isinstance(model, nn.Module):
        field = _find_mode(
            [f.name for f in dataclasses.fields(model) if f.name != "parent"]
        )
    given = {} if argument is None else {argument[0]: True}
    silent = argument is None and field is None and linen
    try:
        signature.bind(model, None, **given)
    except TypeError:
        silent = True
    if silent:
        raise ValueError(_call_help(model, known[1:]))

    by_position = argument is not None and (
        known.index(argument[0]) == 2
        and signature.parameters[argument[0]].kind
        is not inspect.Parameter.KEYWORD_ONLY
    )

    def default(model: Any, batch: Any, train: bool) -> Any:
        if argument is not None:
            name, sign = argument
            mode = train == sign
            # nn.vmap and nn.scan do not support keyword arguments.
            if by_position:
                return model(batch, mode)
            return model(batch, **{name: mode})
        if field is not None:
            name, sign = field
            # In the scope of the bound model, to use its variables.
            model = model.clone(**{name: train == sign}, parent=model.scope)
        return model(batch)

    return _with_option_hints(default) if linen else default


def _with_option_hints(call: ModelCall) -> ModelCall:
    """Extends flax's errors about collections and streams by a remedy."""

    @functools.wraps(call)
    def explained(model: Any, batch: Any, train: bool) -> Any:
        try:
            return call(model, batch, train)
        except (
            errors.ModifyScopeVariableError,
            errors.ScopeCollectionNotFound,
        ) as error:
            if not train and '"batch_stats"' in str(error):
                raise ValueError(
                    f"{_sentence(error)} This happened in inference, with "
                    "train=False: the model does not receive the mode. If it "
                    'should update batch_stats, pass mutable=["batch_stats"].'
                ) from error
            raise ValueError(
                f"{_sentence(error)} If the call creates that collection, pass "
                'its name: mutable=["..."].'
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{_sentence(error)} Pass a key for that stream in rngs, or "
                "omit rngs."
            ) from error

    return explained


def _sentence(error: Exception) -> str:
    text = str(error).partition(" (http")[0].rstrip(".")
    return f"{type(error).__name__}: {text}."


def _find_mode(names: Collection[str]) -> tuple[str, bool] | None:
    for known, sign in ((_TRAINING, True), (_INFERENCE, False)):
        for name in known:
            if name in names:
                return name, sign
    return None


def _call_help(model: Any, known: list[str]) -> str:
    names = ", ".join((*_TRAINING, *_INFERENCE))
    linen = isinstance(model, nn.Module)
    text = (
        f"Cannot call {type(model).__name__} without call=: by default it is "
        "called with the batch, and its mode is set by an argument"
        f"{' or a field' if linen else ''} with one of the names {names}; it "
        f"takes ({', '.join(known)}). Pass for example "
        'call=lambda model, batch, train: model(batch["x"], mode=train)'
    )
    if linen:
        text += (
            ", or for a field call=lambda model, batch, "
            "train: model.clone(mode=train, parent=model.scope)(batch)"
        )
    return text + "."
