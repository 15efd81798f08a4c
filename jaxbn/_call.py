"""How the tools for whole models call a model, of flax.linen or flax.nnx."""

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

# What a model calls the argument or the field that says its mode.
_TRAINING = ("train", "training", "is_training")
_INFERENCE = ("use_running_average", "deterministic", "eval", "inference")


def make_model_call(model: Any, call: ModelCall | None) -> ModelCall:
    """Returns call, or for None one that finds the mode by its name.

    Args:
      model: a linen or nnx module.
      call: (model, batch, train) -> output, or None.

    Returns:
      A function for a linen model as `method` of apply, for an nnx model to
      call itself.

    Raises:
      ValueError: model is neither; or call is None, and the batch alone does
        not fit the arguments of the model or a linen model has no mode.
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
            # nn.vmap and nn.scan leave out what is given by name.
            if by_position:
                return model(batch, mode)
            return model(batch, **{name: mode})
        if field is not None:
            name, sign = field
            # In the scope of the bound model, so that variables are its own.
            model = model.clone(**{name: train == sign}, parent=model.scope)
        return model(batch)

    return _with_option_hints(default) if linen else default


def _with_option_hints(call: ModelCall) -> ModelCall:
    """Makes what flax says of a collection or a stream name the option."""

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
                    f"{_sentence(error)} That is in inference, train=False: "
                    "the call does not reach what says the mode. If it is "
                    'meant to write there, give mutable=["batch_stats"].'
                ) from error
            raise ValueError(
                f"{_sentence(error)} If the call creates that collection, name "
                'it: mutable=["..."].'
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                f"{_sentence(error)} Give a key for that stream in rngs, or "
                "leave rngs out."
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
        f"How is {type(model).__name__} called? Without call=, it gets the "
        "batch alone, and its mode by an argument"
        f"{' or a field' if linen else ''} of one of the names {names}; it "
        f"takes ({', '.join(known)}). Write it, such as "
        'call=lambda model, batch, train: model(batch["x"], mode=train)'
    )
    if linen:
        text += (
            ", or with a field of another name call=lambda model, batch, "
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
    """Returns mutable and rngs for the apply of a linen model in training.

    Args:
      variables: of the model; all their collections but params are written.
      rngs: a key or a dict of them; None makes one for every stream, because
        flax takes "params" for a stream that is not there.
      mutable: names of more collections.
      number: of the batch, so that each has keys of its own; None keeps them.

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
    """Returns the one argument that goes to call; raises for any other."""
    if len(args) != 1 or kwargs:
        names = [*map(str, range(len(args))), *kwargs]
        raise ValueError(
            "With call=, the batch is the one argument, and call hands its "
            f"parts to the model; got arguments {', '.join(names) or 'none'}. "
            "Put them into a tuple or a dict."
        )
    return args[0]


def uses_running_average(
    layer: Any,
    x: Any,
    use_running_average: bool | None = None,
    **_: Any,
) -> bool:
    """Whether a call of a batch norm layer takes the running statistics.

    Args:
      layer: of flax or jaxbn.
      x: its input.
      use_running_average: as it is given to the call.
    """
    if use_running_average is None:
        use_running_average = layer.use_running_average
    return bool(use_running_average)


def check_nnx_options(rngs: Any, mutable: Collection[str]) -> None:
    """Raises ValueError where an option of linen is given for an nnx model."""
    if rngs is not None or mutable:
        name = "rngs" if rngs is not None else "mutable"
        raise ValueError(
            f"{name}= is for flax.linen. A model of flax.nnx holds its random "
            "streams and all its state; set them there, or in call."
        )


def advance_streams(model: Any, number: Any) -> None:
    """Gives the random streams of an nnx model values of a batch's own.

    Args:
      model: a copy that belongs to the caller.
      number: of the batch.
    """
    for _, count in nnx.iter_graph(model):
        if isinstance(count, nnx.RngCount):
            value = count.get_value()
            # Further than the calls of one batch go.
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
    """Returns a model as a pure function, and the variables it takes.

    Args:
      model: a linen or nnx module.
      variables: of a linen model; None for nnx.
      call: see `make_model_call`.
      rngs: see `linen_options`.
      mutable: see `linen_options`.

    Returns:
      (apply, variables): apply(variables, batch, train=True) -> (output, new
      variables). Of a linen model variables and new ones are collections; of
      an nnx model both are its nnx.State, but for random streams, which start
      anew in each call.

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
