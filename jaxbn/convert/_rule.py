"""What becomes of a flax.linen batch norm layer while its model runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from jaxbn.convert._checks import own_class, refuse, spell_class
from jaxbn.linen import BatchNorm

# Inside a model JAX must not reuse what it traced for the unconverted one, so
# the rule in force is a part of its cache keys. None: no converted model runs.
_active = jax.make_user_context(None)
_SHARED = {field.name for field in dataclasses.fields(nn.BatchNorm)}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of a batch norm layer."""

    to: type[nn.Module]
    fields: tuple[tuple[str, Any], ...] = ()  # sorted by name
    keep: frozenset[type] = frozenset()

    def then(self, later: Rule) -> Rule:
        """Returns the rule that does both, the other one last."""
        fields = {**dict(self.fields), **dict(later.fields)}
        keep = self.keep | later.keep
        return Rule(later.to, tuple(sorted(fields.items())), keep)

    def check(self, path: str, fields: dict[str, Any]) -> None:
        """Raises where the layer to make cannot have the fields."""
        if self.to is nn.BatchNorm:
            refuse(path, fields, _DEFAULTS, _SHARED)

    def apply(self, layer: nn.Module) -> tuple[type, dict[str, Any]]:
        """Returns class and fields of what a layer turns into."""
        kind = written_class(layer)
        if kind in self.keep:
            return kind, fields_of(layer, kind)
        if not issubclass(kind, self.to):
            plain = nn.BatchNorm if self.to is BatchNorm else BatchNorm
            if kind is not plain:
                path = layer_path(layer)
                raise ValueError(own_class(path, kind, self.to, plain))
            kind = self.to
        fields = {**fields_of(layer, BatchNorm), **dict(self.fields)}
        self.check(layer_path(layer), fields)
        known = fields_of(layer, kind)
        return kind, {name: fields.get(name, known[name]) for name in known}


def runs_as(layer: nn.Module) -> nn.Module:
    """Returns what runs in place of a layer; see `jaxbn.convert`."""
    rule = _active.value
    if rule is None or not isinstance(layer, (nn.BatchNorm, BatchNorm)):
        return layer
    cls, fields = rule.apply(layer)
    running: nn.Module = cls(**fields, parent=None, name=layer.name)
    return running


def written_class(module: nn.Module) -> type[nn.Module]:
    """The class as its author wrote it."""
    kind = type(module)
    written: type[nn.Module] = vars(kind).get("_converted_from", (kind,))[0]
    return written


def layer_path(layer: nn.Module) -> str:
    path = layer.path if layer.scope is not None else ()
    return "/".join(path) or layer.name or "the model itself"


def fields_of(module: nn.Module, cls: type) -> dict[str, Any]:
    """Fields to make a cls with; what module lacks has its default."""
    own = {field.name for field in dataclasses.fields(module)}
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {
        name: getattr(module, name) if name in own else _DEFAULTS[name]
        for name in names
        if name not in ("parent", "name")
    }


_DEFAULTS = fields_of(BatchNorm(parent=None), BatchNorm)


def in_force(rule: Rule) -> bool:
    """Whether running under the rule would change nothing."""
    active = _active.value
    return active is not None and rule.then(active) == active


@contextlib.contextmanager
def activated(rule: Rule) -> Iterator[None]:
    """Exchanges the layers that are called inside."""
    if in_force(rule):
        yield
        return
    outer = _active.value
    rule = rule if outer is None else rule.then(outer)
    exchange = functools.partial(_exchange, rule)
    with _active(rule), nn.intercept_methods(exchange):
        yield


def _exchange(
    rule: Rule, call: Callable[..., Any], args: Any, kwargs: Any, context: Any
) -> Any:
    """Runs in place of a layer's call what the rule makes of the layer."""
    layer = context.module
    ours = isinstance(layer, (nn.BatchNorm, BatchNorm))
    # Of models inside models the innermost rule knows all outer ones.
    if not ours or context.method_name != "__call__" or _active.value != rule:
        return call(*args, **kwargs)
    cls, fields = rule.apply(layer)
    if cls is written_class(layer) and fields == fields_of(layer, cls):
        return call(*args, **kwargs)
    # The same bound module under another class: scope, random keys and what
    # flax keeps of the running call stay. The unwrapped method, because this
    # call has been announced, captured and tabulated as the layer's own.
    twin: Any = object.__new__(cls)
    vars(twin).update(vars(layer), **fields)
    method = getattr(cls.__call__, "__wrapped__", cls.__call__)
    known = inspect.signature(method).parameters
    for name in [name for name in kwargs if name not in known]:
        if kwargs.pop(name) is not None:
            raise ValueError(
                f"{layer_path(layer)} is called with {name}, which "
                f"{spell_class(cls)} does not take."
            )
    return method(twin, *args, **kwargs)
