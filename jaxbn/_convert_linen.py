"""Batch norm layers of a flax.linen model, exchanged while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxbn._convert_checks import own_class, refuse, spell_class
from jaxbn.linen import BatchNorm

# Inside a model JAX must not reuse what it traced for the unconverted one, so
# the rule in force is a part of its cache keys. None: no converted model runs.
_active = jax.make_user_context(None)
_classes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
_lock = threading.Lock()
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

    def apply(self, layer: nn.Module) -> tuple[type, dict[str, Any]]:
        """Returns class and fields of what a layer turns into."""
        kind = _written_class(layer)
        if kind in self.keep:
            return kind, _fields(layer, kind)
        if not issubclass(kind, self.to):
            plain = nn.BatchNorm if self.to is BatchNorm else BatchNorm
            if kind is not plain:
                path = layer_path(layer)
                raise ValueError(own_class(path, kind, self.to, plain))
            kind = self.to
        fields = {**_fields(layer, BatchNorm), **dict(self.fields)}
        if self.to is nn.BatchNorm:
            refuse(layer_path(layer), fields, _DEFAULTS, _SHARED)
        known = _fields(layer, kind)
        return kind, {name: fields.get(name, known[name]) for name in known}


def convert(model: nn.Module, rule: Rule) -> nn.Module:
    """Returns the model under a rule; see `jaxbn.convert`."""
    cls = _written_class(model)
    if cls is not type(model):
        rule = type(model)._converted_from[1].then(rule)
    fields = _fields(model, cls)
    if cls in (nn.BatchNorm, BatchNorm):
        cls, fields = rule.apply(model)
    else:
        cls = _converted_class(cls, rule)
    parent = model.parent
    if model.scope is not None:
        parent = model.scope.rewound()
    return cls(**fields, parent=parent, name=model.name)


def _written_class(module: nn.Module) -> type[nn.Module]:
    """The class as its author wrote it."""
    return vars(type(module)).get("_converted_from", (type(module),))[0]


def layer_path(layer: nn.Module) -> str:
    path = layer.path if layer.scope is not None else ()
    return "/".join(path) or layer.name or "the model itself"


def _fields(module: nn.Module, cls: type) -> dict[str, Any]:
    """Fields to make a cls with; what module lacks has its default."""
    own = {field.name for field in dataclasses.fields(module)}
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {
        name: getattr(module, name) if name in own else _DEFAULTS[name]
        for name in names
        if name not in ("parent", "name")
    }


_DEFAULTS = _fields(BatchNorm(parent=None), BatchNorm)


@contextlib.contextmanager
def _activated(rule: Rule) -> Iterator[None]:
    outer = _active.value
    if outer is not None:
        rule = rule.then(outer)
    if rule == outer:
        yield
        return
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
    if cls is _written_class(layer) and fields == _fields(layer, cls):
        return call(*args, **kwargs)
    # The same bound module under another class: scope, random keys and what
    # flax keeps of the running call stay. The unwrapped method, because this
    # call has been announced, captured and tabulated as the layer's own.
    twin = object.__new__(cls)
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


def _converted_class(cls: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """A subclass of cls that runs under the rule and looks like cls."""
    with _lock:
        found = _classes.get((cls, rule))
        if found is None:
            found = _make_class(cls, rule)
            _classes[cls, rule] = found
    return found


def _make_class(cls: type[nn.Module], rule: Rule) -> type[nn.Module]:
    def under_rule(function: Callable[..., Any]) -> Callable[..., Any]:
        @nn.nowrap
        @functools.wraps(function)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _activated(rule):
                return function(self, *args, **kwargs)

        return method

    def handed_out(self: nn.Module, name: str, value: Any) -> Any:
        """A submodule of a bound model, reached from outside its methods."""
        if name == "parent" or name.startswith("__") or self.scope is None:
            return value
        active = _active.value
        if active is not None and rule.then(active) == active:
            return value
        return _map_modules(lambda module: convert(module, rule), value)

    @nn.nowrap
    def __getattribute__(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if isinstance(value, (nn.Module, tuple, list, Mapping)):
            return handed_out(self, name, value)
        return value

    @nn.nowrap
    def __getattr__(self: nn.Module, name: str) -> Any:
        return handed_out(self, name, cls.__getattr__(self, name))

    @nn.nowrap
    def __eq__(self: nn.Module, other: Any) -> Any:
        if type(self) is not type(other):
            return NotImplemented
        return cls.__eq__(self, other)

    @nn.nowrap
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        make, args, *rest = cls.__reduce_ex__(self, max(protocol, 2))
        if type(self) is converted and args == (converted,):
            make, args = _make_blank, (cls, rule)
        return make, args, *rest

    namespace = {
        name: under_rule(function) for name, function in _methods(cls).items()
    }
    for name in ("__init__", "__hash__", "__module__", "__doc__"):
        namespace[name] = getattr(cls, name)
    namespace.update(
        __qualname__=cls.__qualname__,
        __getattribute__=__getattribute__,
        __getattr__=__getattr__,
        __eq__=__eq__,
        __reduce_ex__=__reduce_ex__,
        _converted_from=(cls, rule),
    )
    converted = types.new_class(
        cls.__name__, (cls,), exec_body=lambda body: body.update(namespace)
    )
    return converted


def _make_blank(cls: type[nn.Module], rule: Rule) -> nn.Module:
    converted = _converted_class(cls, rule)
    return converted.__new__(converted)


def _methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods through which a model may be entered, flax's own included."""
    fields = {field.name for field in dataclasses.fields(cls)}
    found = {}
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        private = name.startswith("_") and value is vars(nn.Module).get(name)
        dunder = name.startswith("__") and name != "__call__"
        if private or dunder or name in fields or inspect.isclass(value):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            continue
        if callable(value) and hasattr(type(value), "__get__"):
            found[name] = value
    return found


def _map_modules(convert: Callable[[nn.Module], Any], value: Any) -> Any:
    if isinstance(value, nn.Module):
        return convert(value)
    again = functools.partial(_map_modules, convert)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    if type(value) in (tuple, list):
        return type(value)(map(again, value))
    if isinstance(value, (dict, nn.FrozenDict)):
        return type(value)({k: again(v) for k, v in value.items()})
    return value
