"""Exchanges the layers of a linen or nnx model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from flax import linen as nn
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.convert import _linen, _nnx, _run
from jaxbn.convert._rule import Rule

_Model = TypeVar("_Model")


def to_jaxbn(
    model: _Model,
    *,
    keep: Iterable[type | str] = (),
    replace: Mapping[type, Callable[..., Any]] | None = None,
    **overrides: Any,
) -> _Model:
    """Returns the model with jaxbn's BatchNorm in place of flax's.

    Parameters, statistics, their paths and what initialization draws stay the
    same, and the code of the model as it is.

    A linen model becomes an instance of a subclass made for it, which exchanges
    a layer at the moment it is called, however the code came by it. It is equal
    to another conversion of an equal model, can be pickled, and is a submodule
    like any other. Of the model's own parts only what a bound model hands out
    is converted too; the fields of an unbound one are what they were. What JAX
    traces after the model has returned is out of its reach: the forward
    function of an nn.custom_vjp, under jax.grad of jax.jit.

    Of an nnx model a copy is returned, in which layers that were shared are
    shared. Variables are copies too, over the same arrays, as `nnx.clone`
    makes them. A linen model inside `nnx.bridge.ToNNX` and an nnx model inside
    `nnx.bridge.ToLinen` are converted as well.

    A layer that is neither flax's nor jaxbn's and owns a mean and a variance
    in batch_stats is converted if it has the fields of flax's layer and,
    tried on a small batch, the same variables, outputs, running statistics and
    gradients: a copy of flax's code, or a subclass of flax's layer. Any other
    is an error, unless replace or keep names it. A trial takes about a second
    for a class and its options.

    Args:
      model: a flax.linen or flax.nnx module, or a layer itself. Layers of
        jaxbn in it stay, with the overrides.
      keep: what to leave as it is: classes, with their subclasses, or paths of
        layers such as "encoder/norm".
      replace: class of batch norm layers, with its subclasses -> rule. In
        linen it is called as the layer is, with the layer first: rule(layer,
        x, ...), and returns the `jaxbn.linen.BatchNorm` to call with x, or a
        pair of that and a dict of further arguments, such as mask and
        use_running_average. Of the layer it may read the fields. Variables
        are those that BatchNorm makes. In nnx it is rule(layer), and returns a
        `jaxbn.nnx.BatchNorm` that holds what it takes over. BatchNorm itself
        is a rule for a class with flax's fields, variables and call.
      **overrides: fields to set on every layer, such as axis_name="data".

    Returns:
      A model that is used as the one given.

    Raises:
      ValueError: an override is no field of the layer, cannot be hashed (in
        linen), or would change the shape of a variable of an nnx layer; layers
        that own a mean and a variance would be left as they are, all of which
        are listed (in linen, when the model has run); a rule returns something
        else; model is something else.
    """
    if isinstance(model, nn.Module):
        known = [
            field.name
            for field in dataclasses.fields(jaxbn.linen.BatchNorm)
            if field.name not in ("parent", "name")
        ]
    else:
        known = list(_nnx.options(jaxbn.nnx.BatchNorm))
    wrong = [name for name in overrides if name not in known]
    if wrong:
        raise ValueError(
            f"BatchNorm has no field {', '.join(wrong)} that conversion could "
            f"set. It has {', '.join(known)}."
        )
    rule = _rule(jaxbn.linen.BatchNorm, overrides, keep, replace or {})
    return _convert(model, rule)


def to_flax(model: _Model, *, keep: Iterable[type | str] = ()) -> _Model:
    """Returns the model with flax's BatchNorm in place of jaxbn's.

    The inverse of `to_jaxbn`: fields that both layers have stay, also those
    that `to_jaxbn` has set. flax computes with its own arithmetic again, and
    wants axis_name to be bound.

    Args:
      model: see `to_jaxbn`.
      keep: see `to_jaxbn`.

    Returns:
      A model that is used as the one given.

    Raises:
      ValueError: a field that flax lacks is not at its default (in linen, when
        the layer is called, unless `to_jaxbn` set it); layers are subclasses
        of jaxbn's BatchNorm and not in keep (in linen, when the model has
        run); model is something else.
    """
    return _convert(model, _rule(nn.BatchNorm, {}, keep, {}))


def runs_as(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Returns the layer that runs in place of one, for who looks from outside.

    An interceptor of `flax.linen.intercept_methods` sees a layer of a converted
    model as the model's code made it, with the fields given there.

    Args:
      layer: such as `context.module` of an interceptor.
      *args, **kwargs: of its call. Without them a layer that is neither
        flax's nor jaxbn's is known once it has run.

    Returns:
      An unbound layer with the fields that are in force; layer itself where no
      converted model is running or it stays as it is.

    Raises:
      ValueError: the conversion in force refuses the layer; see `to_jaxbn`.
    """
    return _run.runs_as(layer, args, kwargs)


def on_one_device(model: _Model, keep: Iterable[type | str] = ()) -> _Model:
    """Returns `to_jaxbn` of a model, without groups of devices."""
    rule = _rule(jaxbn.linen.BatchNorm, {}, keep, {})
    return _convert(model, dataclasses.replace(rule, one_device=True))


def _convert(model: _Model, rule: Rule) -> _Model:
    if isinstance(model, nn.Module):
        return cast("_Model", _linen.convert(model, rule))
    if isinstance(model, nnx.Pytree):
        convert_linen = functools.partial(_linen.convert, rule=rule)
        copy: _Model = _nnx.convert(model, rule, convert_linen)
        return copy
    raise ValueError(
        "model must be a flax.linen or flax.nnx module; got "
        f"{'the class ' if isinstance(model, type) else ''}{model!r}. A class "
        "is converted once it has been called."
    )


def _rule(
    to: type[nn.Module],
    overrides: Mapping[str, Any],
    keep: Iterable[type | str],
    replace: Mapping[type, Any],
) -> Rule:
    keep = [keep] if isinstance(keep, (str, type)) else list(keep)
    for one in keep:
        if not isinstance(one, (str, type)):
            raise ValueError(
                f"keep must hold classes, or paths of layers; got {one!r}."
            )
    for kind, make in replace.items():
        if not isinstance(kind, type) or not callable(make):
            raise ValueError(
                "replace must map classes to functions that return a "
                f"BatchNorm; got {{{kind!r}: {make!r}}}."
            )
    fields = tuple(sorted((k, _frozen(v)) for k, v in overrides.items()))
    return Rule(to, fields, frozenset(keep), tuple(replace.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value
