"""Public functions that convert linen and nnx models."""

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
    """Returns the model with flax's BatchNorm layers replaced by jaxbn's.

    Parameters, statistics, their paths, the random numbers of initialization
    and the code of the model stay the same.

    A linen model is returned as an instance of a subclass of its class, which
    replaces each layer when it is called, however the code obtained it.
    Conversions of equal models are equal; they can be pickled and used as
    submodules. Submodules obtained from a bound model are converted too; fields
    of an unbound model are not. Whatever JAX traces after the model has
    returned is not converted: the forward function of an nn.custom_vjp, under
    jax.grad of jax.jit.

    An nnx model is copied, including its variables, but not their arrays, as by
    `nnx.clone`; shared layers stay shared. A linen model in `nnx.bridge.ToNNX`
    and an nnx model in `nnx.bridge.ToLinen` are converted as well.

    A layer that is neither flax's nor jaxbn's, but has a mean and a variance in
    batch_stats, is converted if it has the fields of flax's layer and, tried on
    a small batch, the same variables, outputs, running statistics and
    gradients; for example a copy of flax's code, or a subclass of flax's layer.
    Any other such layer is an error, unless it is in replace or keep. A trial
    takes about a second for each class with its options.

    Args:
      model: a flax.linen or flax.nnx module, or a layer itself. Layers of jaxbn
        in it stay, with the overrides.
      keep: layers to leave as they are: classes, including their subclasses, or
        paths such as "encoder/norm".
      replace: class of batch norm layers, including its subclasses -> rule. In
        linen a rule is called like the layer, with the layer first: rule(layer,
        x, ...). It may read the fields of the layer, and returns the
        `jaxbn.linen.BatchNorm` to call with x, or a pair of that and a dict of
        further arguments, such as mask and use_running_average. The variables
        are those of BatchNorm. In nnx it is rule(layer), and returns a
        `jaxbn.nnx.BatchNorm` that holds the variables to take over. BatchNorm
        itself is a rule for classes with the fields, variables and call of
        flax's layer.
      **overrides: fields to set on all layers, such as axis_name="data".

    Returns:
      A model that is used like the original.

    Raises:
      ValueError: an override is not a field of the layer, cannot be hashed
        (linen), or would change the shape of a variable (nnx); layers with a
        mean and a variance would not be converted, all of which are listed (in
        linen, after the model has run); a rule returns something else; or model
        is not a module.
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
    """Returns the model with jaxbn's BatchNorm layers replaced by flax's.

    The inverse of `to_jaxbn`. Fields that both layers have are kept, including
    those set by `to_jaxbn`. Statistics are computed by flax again, which
    requires axis_name to be bound.

    Args:
      model: see `to_jaxbn`.
      keep: see `to_jaxbn`.

    Returns:
      A model that is used like the original.

    Raises:
      ValueError: a field that flax lacks is not at its default (in linen, when
        the layer is called, unless `to_jaxbn` has set it); a layer is a
        subclass of jaxbn's BatchNorm and not in keep (in linen, after the model
        has run); or model is not a module.
    """
    return _convert(model, _rule(nn.BatchNorm, {}, keep, {}))


def runs_as(layer: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Returns the layer that runs in place of another one, for interceptors.

    In a converted model, an interceptor of `flax.linen.intercept_methods` sees
    each layer as the code of the model made it, with the fields given there.

    Args:
      layer: a bound layer, such as `context.module` of an interceptor.
      *args, **kwargs: arguments of its call. Without them, the result for a
        layer that is neither flax's nor jaxbn's is only known after it has run.

    Returns:
      An unbound layer with the fields in force; layer itself if no converted
      model is running or the layer is not replaced.

    Raises:
      ValueError: the conversion in force refuses the layer; see `to_jaxbn`.
    """
    return _run.runs_as(layer, args, kwargs)


def on_one_device(model: _Model, keep: Iterable[type | str] = ()) -> _Model:
    """Returns `to_jaxbn` of a model, with groups of devices removed."""
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
