"""Batch norm layers of a flax.nnx model, exchanged in a copy of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from jaxbn.convert._checks import own_class, refuse, spell
from jaxbn.nnx import BatchNorm

# Of these a layer keeps no record, and the variables they make exist already.
_CONSTRUCTION = {
    "rngs",
    "bias_init",
    "scale_init",
    "bias_metadata",
    "scale_metadata",
}

# The others count batches, and go with the option that made them.
_VARIABLES = {"mean", "var", "scale", "bias"}


def convert(
    model: Any,
    to: type[nnx.BatchNorm],
    *,
    overrides: dict[str, Any],
    keep: frozenset[type],
    convert_linen: Callable[[nn.Module], nn.Module],
) -> Any:
    """Returns a copy with other layers; see `jaxbn.convert`."""
    # In graph mode, where a layer may have several owners.
    copy = nnx.clone(model, graph=True)
    layers, bridges = [], []
    for path, node in nnx.iter_graph(copy, graph=True):
        if isinstance(node, nnx.BatchNorm):
            name = "/".join(map(str, path)) or "the model itself"
            if _concerns(type(node), to, name, keep, overrides):
                layers.append((node, _exchange(node, name, to, overrides)))
        elif isinstance(node, nnx.Pytree):
            for name, value in vars(node).items():
                if isinstance(value, nn.Module):
                    bridges.append((node, name, convert_linen(value)))
    for node, (cls, attributes, carried) in layers:
        # The object stays, and with it whatever refers to it: lists, tuples,
        # several owners, cycles. These classes differ in attributes alone.
        node.__class__ = cls
        vars(node).clear()
        vars(node).update(attributes)
        for name, value in carried.items():
            setattr(node, name, value)
    for node, name, module in bridges:
        vars(node)[name] = module
    return copy


def options(cls: type[nnx.BatchNorm]) -> dict[str, Any]:
    """Returns what a layer of flax or jaxbn is made with, and defaults."""
    return {
        name: parameter.default
        for kind in (nnx.BatchNorm, cls)
        for name, parameter in inspect.signature(
            kind.__init__
        ).parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY
        and name not in _CONSTRUCTION
    }


def _concerns(
    kind: type[nnx.BatchNorm],
    to: type[nnx.BatchNorm],
    path: str,
    keep: frozenset[type],
    overrides: dict[str, Any],
) -> bool:
    """Whether a layer changes."""
    ours = issubclass(kind, BatchNorm)
    if kind in keep:
        return False
    if to is BatchNorm and ours:
        return bool(overrides)
    plain = nnx.BatchNorm if to is BatchNorm else BatchNorm
    if kind is not plain and issubclass(kind, plain):
        raise ValueError(own_class(path, kind, to, plain))
    return kind is plain


def _exchange(
    layer: nnx.BatchNorm,
    path: str,
    to: type[nnx.BatchNorm],
    overrides: dict[str, Any],
) -> tuple[type[nnx.BatchNorm], dict[str, Any], dict[str, Any]]:
    """Returns the class, its attributes, and what stays of the old ones."""
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
        # What counts batches: one for each of the layers of nnx.vmap.
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
    return cls, vars(new), carried


def _read(layer: nnx.BatchNorm, cls: type[nnx.BatchNorm]) -> dict[str, Any]:
    """Returns the options of a layer; the shapes of its variables say more."""
    found = {}
    for name, default in options(cls).items():
        holder = (
            layer if hasattr(layer, name) else getattr(layer, "scope", None)
        )
        found[name] = getattr(holder, name, default)
    return found


def _shapes(layer: nnx.BatchNorm) -> dict[str, tuple[int, ...]]:
    return {
        name: value.shape
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable)
    }
