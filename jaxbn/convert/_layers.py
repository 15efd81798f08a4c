"""Class, path, fields and variables of a flax.linen layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxbn.linen import BatchNorm

# The fields that flax's layer and jaxbn's have in common.
SHARED = frozenset(field.name for field in dataclasses.fields(nn.BatchNorm))


def written_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class as its author wrote it, without the conversion."""
    kind = type(module)
    written: type[nn.Module] = vars(kind).get("_converted_from", (kind,))[0]
    return written


def layer_path(layer: nn.Module) -> str:
    path = layer.path if layer.scope is not None else ()
    return "/".join(path) or layer.name or "the model itself"


def fields_of(module: nn.Module, cls: type) -> dict[str, Any]:
    """Returns the fields of cls with the values of module, or defaults."""
    own = {field.name for field in dataclasses.fields(module)}
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {
        name: getattr(module, name) if name in own else DEFAULTS[name]
        for name in names
        if name not in ("parent", "name")
    }


DEFAULTS: dict[str, Any] = {}
DEFAULTS.update(fields_of(BatchNorm(parent=None), BatchNorm))


def variables_of(layer: nn.Module, collection: str) -> dict[str, Any]:
    """Returns the variables of a bound layer itself, without submodules."""
    held = layer.variables.get(collection, {})
    return {
        name: value
        for name, value in held.items()
        if not isinstance(value, Mapping)
    }
