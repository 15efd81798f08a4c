"""Replaces the layers of a flax.linen model while it runs."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxbn._compat.modules import (
    fields_and_parts,
    flagged,
    shares_scope,
    unwrapped_call,
    with_class,
)
from jaxbn.convert import _nnx
from jaxbn.convert._checks import owned_statistics, refuse_left
from jaxbn.convert._layers import (
    fields_of,
    layer_path,
    variables_of,
    written_class,
)
from jaxbn.convert._rule import Rule, StandIn, run
from jaxbn.linen import BatchNorm


@dataclasses.dataclass
class _Record:
    """Layers seen while a model runs, by path."""

    done: dict[str, StandIn | None] = dataclasses.field(default_factory=dict)
    left: dict[str, tuple[type, str]] = dataclasses.field(default_factory=dict)
    why: dict[str, str] = dataclasses.field(default_factory=dict)
    running: set[Any] = dataclasses.field(default_factory=set)

    def inside(self, layer: nn.Module, is_call: bool) -> bool:
        """Returns whether a method is called by one that is already handled."""
        called = (id(layer), True) in self.running
        return called or not is_call and (id(layer), False) in self.running

    @contextlib.contextmanager
    def entered(self, layer: nn.Module, is_call: bool) -> Iterator[None]:
        self.running.add((id(layer), is_call))
        try:
            yield
        finally:
            self.running.discard((id(layer), is_call))


# The rule in force, or None if no converted model is running.
_active: contextvars.ContextVar[tuple[Rule, _Record] | None] = (
    contextvars.ContextVar("jaxbn.convert", default=None)
)
_FLAG = "jaxbn.convert"
_NOT_RUN = object()


def runs_as(layer: nn.Module, args: Any, kwargs: Any) -> nn.Module:
    """Returns the layer that runs in place of one; see `jaxbn.convert`."""
    active = _active.get()
    if active is None:
        return layer
    rule, record = active
    path, kind = layer_path(layer), written_class(layer)
    is_known = isinstance(layer, (nn.BatchNorm, BatchNorm))
    found: StandIn | str | None = record.done.get(path)
    if found is None and (is_known or args) and not rule.keeps(kind, path):
        found = rule.stand_in(layer, args, kwargs)
    if isinstance(found, StandIn):
        running: nn.Module = found.cls(
            **found.fields, parent=None, name=layer.name
        )
        return running
    if isinstance(found, str) and is_known:
        refuse_left({path: (kind, found)})
    return layer


def in_force(rule: Rule) -> bool:
    """Returns whether the rule would add nothing to the one in force."""
    active = _active.get()
    return active is not None and rule.then(active[0]) == active[0]


@contextlib.contextmanager
def activated(rule: Rule, *modules: Any) -> Iterator[None]:
    """Replaces the layers that are called inside.

    Args:
      rule: rule for the layers.
      *modules: bound modules that are used inside, in any containers.

    Raises:
      ValueError: on exit, if a layer was left out.
    """
    outer = _active.get()
    if outer is not None and in_force(rule):
        with _flagged(outer[0], modules):
            yield
        return
    rule, record = (
        (rule, _Record()) if outer is None else (rule.then(outer[0]), outer[1])
    )
    exchange = functools.partial(_exchange, rule, record)
    token = _active.set((rule, record))
    try:
        with _flagged(rule, modules), nn.intercept_methods(exchange):
            yield
    finally:
        _active.reset(token)
    if outer is None:
        refuse_left(record.left)


def _flagged(
    rule: Rule, modules: Any
) -> contextlib.AbstractContextManager[None]:
    """Sets a flag on the scopes of modules, and on scopes created in them.

    nn.jit caches traces by the flags of the scope, among others, so a trace is
    not reused if another rule or none is in force.
    """
    scopes: dict[int, Any] = {}
    _find_scopes(modules, scopes, set())
    return flagged(scopes.values(), {_FLAG: hash(rule)})


def _find_scopes(value: Any, found: dict[int, Any], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    below: Any = ()
    if isinstance(value, nn.Module):
        if value.scope is not None:
            found[id(value.scope)] = value.scope
            below = fields_and_parts(value)
    elif isinstance(value, Mapping):
        below = value.values()
    elif isinstance(value, (tuple, list)):
        below = value
    for part in below:
        _find_scopes(part, found, seen)


def _exchange(
    rule: Rule,
    record: _Record,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Interceptor that runs the replacement of a layer instead of its call."""
    layer, active = context.module, _active.get()
    # In nested converted models, the innermost rule includes the outer ones.
    if active is None or active[0] != rule or layer.scope is None:
        return call(*args, **kwargs)
    path, kind = layer_path(layer), written_class(layer)
    if rule.keeps(kind, path):
        record.done[path] = None
        return call(*args, **kwargs)
    is_call = context.method_name == "__call__"
    if record.inside(layer, is_call):
        return call(*args, **kwargs)
    if context.method_name == "setup" and rule.replacement(kind) is not None:
        return None  # it would make variables that nothing uses
    with record.entered(layer, is_call):
        return _run_layer(rule, record, layer, is_call, call, args, kwargs)


def _run_layer(
    rule: Rule,
    record: _Record,
    layer: nn.Module,
    is_call: bool,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    path, kind = layer_path(layer), written_class(layer)
    y = _NOT_RUN
    if is_call:
        if isinstance(layer, nnx.bridge.ToLinen):
            record.done[path] = None
            return _run_nnx(rule, record, layer, path, args, kwargs)
        is_candidate = True
        if rule.may_be_copy(layer):
            if layer.is_initializing() or not _statistics(layer):
                # The layer initializes its variables, the stand-in uses them.
                y = call(*args, **kwargs)
            is_candidate = bool(_statistics(layer))
        found = rule.stand_in(layer, args, kwargs) if is_candidate else None
        if isinstance(found, StandIn):
            record.done[path] = found
            if found.cls is kind and found.fields == fields_of(layer, kind):
                return call(*args, **kwargs)
            return run(layer, found)
        if found is not None:
            record.why[path] = found
    if y is _NOT_RUN:
        y = call(*args, **kwargs)
    if path not in record.done:
        _note(rule, record, layer, path, kind)
    return y


def _statistics(layer: nn.Module) -> tuple[str, ...]:
    return owned_statistics(variables_of(layer, "batch_stats"))


def _note(
    rule: Rule, record: _Record, layer: nn.Module, path: str, kind: type
) -> None:
    """Records that a layer was not replaced, if it is a batch norm."""
    own = _statistics(layer)
    if shares_scope(layer):
        return  # the submodule owns them
    known = isinstance(layer, (nn.BatchNorm, BatchNorm)) and path in record.why
    if known or (own and rule.to is BatchNorm):
        words = f"which owns {' and '.join(own)} in batch_stats"
        record.left.setdefault(path, (kind, record.why.get(path, words)))


def _run_nnx(
    rule: Rule, record: _Record, layer: Any, path: str, args: Any, kwargs: Any
) -> Any:
    """Runs a layer that wraps an nnx module, after converting that."""

    def make(*args: Any, **kwargs: Any) -> Any:
        module = layer.nnx_class(*args, **kwargs)
        above = "" if path == "the model itself" else path
        record.left.update(_nnx.exchange(module, rule, above=above))
        return module

    twin = with_class(layer, type(layer), {"nnx_class": make})
    with record.entered(twin, True):
        return unwrapped_call(type(layer))(twin, *args, **kwargs)
