"""Calls flax.linen and flax.nnx models in training or inference mode."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
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
      ValueError: see `make_model_call`; rngs or mutable are given for an nnx model.
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
