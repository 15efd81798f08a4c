"""Converts flax.nnx models, by replacing the layers of a copy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from jaxbn import linen
from jaxbn._compat.modules import become
from jaxbn._scope import Scope
from jaxbn.convert import _copies_nnx
from jaxbn.convert._checks import (
    owned_statistics,
    refuse,
    refuse_left,
    spell,
    subclass_of,
)
from jaxbn.convert._rule import Rule
from jaxbn.nnx import BatchNorm

_StandIn = tuple[type[nnx.BatchNorm], dict[str, Any]]

# Arguments that a layer does not store; its variables exist already.
_CONSTRUCTION = {
    "rngs",
    "bias_init",
    "scale_init",
    "bias_metadata",
    "scale_metadata",
}

# Other variables count batches, and depend on options.
_VARIABLES = {"mean", "var", "scale", "bias"}


def convert(
    model: Any, rule: Rule, convert_linen: Callable[[nn.Module], nn.Module]
) -> Any:
    """Returns a copy converted by a rule; see `to_jaxbn`."""
    # In graph mode, so that shared layers stay shared.
    copy = nnx.clone(model, graph=True)
    refuse_left(exchange(copy, rule, convert_linen))
    return copy


def exchange(
    model: Any,
    rule: Rule,
    convert_linen: Callable[[nn.Module], nn.Module] | None = None,
    *,
    above: str = "",
) -> dict[str, tuple[type, str]]:
    """Replaces the layers of a model in place.

    Args:
      model: changed in place.
      rule: rule for its layers, with classes of nnx.
      convert_linen: converts linen models in it; not needed if the model is
        itself inside a converted linen model.
      above: path of the model.

    Returns:
      Layers that were left out: path -> (class, reason).
    """
    to = BatchNorm if rule.to is linen.BatchNorm else nnx.BatchNorm
    layers, bridges, left = [], [], {}
    for path, node in nnx.iter_graph(model, graph=True):
        if not isinstance(node, nnx.Pytree):
            continue
        parts = [part for part in (above, *map(str, path)) if part]
        name, kind = "/".join(parts) or "the model itself", type(node)
        if rule.keeps(kind, name):
            continue
        found = _stand_in(node, name, rule, to)
        if isinstance(found, str):
            left[name] = (kind, found)
        elif found is not None:
            layers.append((node, found))
        for key, value in vars(node).items():
            if isinstance(value, nn.Module) and convert_linen is not None:
                bridges.append((node, key, convert_linen(value)))
    for node, (cls, attributes) in layers:
        become(node, cls, attributes)
    for node, key, module in bridges:
        vars(node)[key] = module
    return left


def options(cls: type[nnx.BatchNorm]) -> dict[str, Any]:
    """Returns the options of a class of layers, with their defaults."""
    return {
        name: parameter.default
        for kind in (nnx.BatchNorm, cls)
        for name, parameter in inspect.signature(
            kind.__init__
        ).parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY
        and name not in _CONSTRUCTION
    }


def _stand_in(
    layer: Any, path: str, rule: Rule, to: type[nnx.BatchNorm]
) -> _StandIn | str | None:
    """Returns the replacement of a node, a reason for none, or None."""
    kind = type(layer)
    sharing = layer.sharing if isinstance(layer, BatchNorm) else Scope()
    overrides = rule.changes(sharing)
    make = rule.replacement(kind)
    if make is not None:
        return _replaced(layer, path, make, overrides)
    if not isinstance(layer, nnx.BatchNorm):
        if to is nnx.BatchNorm or isinstance(layer, nnx.bridge.ToNNX):
            return None
        return _copied(layer, path, overrides)
    ours = issubclass(kind, BatchNorm)
    if to is BatchNorm and ours:
        return _exchange(layer, path, to, overrides) if overrides else None
    plain = nnx.BatchNorm if to is BatchNorm else BatchNorm
    if kind is plain:
        return _exchange(layer, path, to, overrides)
    if not issubclass(kind, plain):
        return None
    found = _copied(layer, path, overrides) if to is BatchNorm else None
    if isinstance(found, tuple):
        return found
    return ", ".join(filter(None, (subclass_of(plain), found)))


def _copied(
    layer: Any, path: str, overrides: dict[str, Any]
) -> _StandIn | str | None:
    """Returns the replacement of a layer that is not flax's or jaxbn's."""
    held = {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable) and not isinstance(value, nnx.Param)
    }
    names = owned_statistics(held)
    if not names:
        return None
    if not _copies_nnx.looks_like_flax(layer):
        return f"which owns {names[0]} and {names[1]}"
    why = _copies_nnx.differs(layer, _read(layer, nnx.BatchNorm))
    if why is not None:
        return why
    return _exchange(layer, path, BatchNorm, overrides)


def _replaced(
    layer: Any, path: str, make: Any, overrides: dict[str, Any]
) -> _StandIn:
    if make is BatchNorm and _copies_nnx.looks_like_flax(layer):
        return _exchange(layer, path, BatchNorm, overrides)
    made = make(layer)
    if not isinstance(made, BatchNorm):
        raise ValueError(
            f"{path}: the rule that replace has for {type(layer).__name__} "
            f"must return a jaxbn.nnx.BatchNorm; got {type(made).__name__}."
        )
    if overrides:
        return _exchange(made, path, BatchNorm, overrides)
    return type(made), dict(vars(made))


def _exchange(
    layer: nnx.BatchNorm,
    path: str,
    to: type[nnx.BatchNorm],
    overrides: dict[str, Any],
) -> _StandIn:
    """Returns class and attributes of a layer with other options."""
    own = BatchNorm if isinstance(layer, BatchNorm) else nnx.BatchNorm
    given = _read(layer, own)
    size, rngs = layer.num_features, nnx.Rngs(0)
    like = own(size, **given, rngs=rngs)
    if to is nnx.BatchNorm:
        shared = options(nnx.BatchNorm)
        refuse(path, given, options(BatchNorm), shared)
        given = {name: given[name] for name in shared}
    new = to(size, **{**given, **overrides}, rngs=rngs)
    before, after = _shapes(like), _shapes(new)
    for name, shape in before.items():
        gone = name not in after and name not in _VARIABLES
        if not gone and after.get(name) != shape:
            raise ValueError(
                f"{path}: {spell(overrides)} would turn {name} of shape "
                f"{shape} into {after.get(name)}. Conversion leaves variables "
                "as they are; make the layer anew."
            )
    stacked = layer.mean.shape[: layer.mean.ndim - like.mean.ndim]
    for name in after.keys() - before.keys():
        # A counter of batches for each layer that nnx.vmap has stacked.
        value = getattr(new, name)
        value.set_value(jnp.broadcast_to(value[...], stacked + value.shape))
    carried = {
        name: value
        for name, value in vars(layer).items()
        if name in before.keys() & after.keys() or name not in vars(like)
    }
    cls = type(layer) if issubclass(type(layer), to) else to
    if to is nnx.BatchNorm:
        cls = to
    for name, value in carried.items():
        setattr(new, name, value)
    return cls, dict(vars(new))


def _read(layer: nnx.BatchNorm, cls: type[nnx.BatchNorm]) -> dict[str, Any]:
    """Returns the options of a layer, without shapes of its variables."""
    found = {}
    for name, default in options(cls).items():
        found[name] = getattr(layer, name, default)
    return found


def _shapes(layer: nnx.BatchNorm) -> dict[str, tuple[int, ...]]:
    return {
        name: value.shape
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable)
    }
