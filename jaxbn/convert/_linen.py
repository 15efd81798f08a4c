"""Converts flax.linen models, by a subclass that enters an interceptor."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn

from jaxbn.convert._checks import spell
from jaxbn.convert._layers import fields_of, layer_path, written_class
from jaxbn.convert._rule import Rule, StandIn
from jaxbn.convert._run import activated, in_force
from jaxbn.linen import BatchNorm

_classes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def convert(model: nn.Module, rule: Rule) -> nn.Module:
    """Returns the model converted by a rule; see `to_jaxbn`."""
    try:
        hash(rule)
    except TypeError as error:
        raise ValueError(
            f"{spell(dict(rule.fields))} cannot be hashed, and as fields of a "
            "linen module they have to be."
        ) from error
    cls = written_class(model)
    if cls is not type(model):
        kind: Any = type(model)
        rule = kind._converted_from[1].then(rule)
        rule.check("every layer", dict(rule.fields))
    fields = fields_of(model, cls)
    is_layer = cls in (nn.BatchNorm, BatchNorm)
    if is_layer and not rule.keeps(cls, layer_path(model)):
        found = cast("StandIn", rule.stand_in(model, (), {}))
        cls, fields = found.cls, found.fields
    elif not is_layer:
        cls = _converted_class(cls, rule)
    parent: Any = model.parent
    if model.scope is not None:
        parent = model.scope.rewound()
    return cls(**fields, parent=parent, name=model.name)


def _converted_class(cls: type[nn.Module], rule: Rule) -> type[nn.Module]:
    """Returns a subclass that applies the rule and is named like cls."""
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
            with activated(rule, self, args, kwargs):
                return function(self, *args, **kwargs)

        return method

    def handed_out(self: nn.Module, name: str, value: Any) -> Any:
        """Converts submodules of a bound model, outside of its methods."""
        if name == "parent" or name.startswith("__") or self.scope is None:
            return value
        if in_force(rule):
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
        reduced: Any = cls.__reduce_ex__(self, max(protocol, 2))
        make, args, *rest = reduced
        if type(self) is converted and args == (converted,):
            make, args = _make_blank, (cls, rule)
        return make, args, *rest

    namespace: dict[str, Any] = {
        name: under_rule(function) for name, function in _methods(cls).items()
    }
    for name in ("__hash__", "__module__", "__doc__"):
        namespace[name] = getattr(cls, name)
    namespace.update(
        __qualname__=cls.__qualname__,
        __getattribute__=__getattribute__,
        __getattr__=__getattr__,
        __eq__=__eq__,
        __reduce_ex__=__reduce_ex__,
        _converted_from=(cls, rule),
    )
    # Not by the metaclass of the model, which may register classes too.
    meta: Any = type(cls)
    new: Any = (abc.ABCMeta if issubclass(meta, abc.ABCMeta) else type).__new__
    converted: type[nn.Module] = new(
        meta, cls.__name__, (_Unannounced, cls), namespace, unannounced=True
    )
    return converted


class _Unannounced:
    """First base of converted classes: skips `__init_subclass__`.

    That of the model may register subclasses by name, and that of flax would
    create fields and wrap methods again, which the class inherits.
    """

    def __init_subclass__(
        cls, *, unannounced: bool = False, **kwargs: Any
    ) -> None:
        if not unannounced:
            super().__init_subclass__(**kwargs)


def _make_blank(cls: type[nn.Module], rule: Rule) -> nn.Module:
    converted = _converted_class(cls, rule)
    return converted.__new__(converted)


def _methods(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Returns the methods that a model may be called by, including flax's."""
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
