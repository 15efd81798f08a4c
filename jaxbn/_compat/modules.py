"""What flax keeps of its modules, which conversion and the layers ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Set
from typing import Any

import flax.linen as nn

# Fields of a module that refer to what it is part of, and not to its parts.
_OUTSIDE = frozenset(["scope", "_state", "_parent_ref"])


def applied_mutable(layer: Any) -> Any:
    """Returns the argument `mutable` of the apply that calls a linen module.

    Inside nn.scan and other lifted transforms the root scope is theirs, whose
    filter may list names although the one outside is a DenyList. Such a root
    has a path, that of apply has none. nn.jit reuses what it traced wherever
    its own filter is the same, so nothing outside may count there. Where
    nothing outside is left, because a lifted class itself is applied, a set is
    what the transform has made of a filter that nobody knows: True.

    `is_mutable_collection` is public, and asks the innermost scope alone.
    """
    root = layer.scope.root
    for module in reversed(nn.module._context.module_stack):
        if not root.debug_path or "jit(" in root.debug_path[-1]:
            return root.mutable
        if module is not None and module.scope is not None:
            root = module.scope.root
    lifted = root.debug_path and isinstance(root.mutable, Set)
    return True if lifted else root.mutable


@contextlib.contextmanager
def detached() -> Iterator[None]:
    """Modules made inside do not become parts of the one that is running.

    `parent=None` is public, for who writes the constructor's call.
    """
    stack: list[Any] = nn.module._context.module_stack
    stack.append(None)
    try:
        yield
    finally:
        stack.pop()


def with_class(
    layer: nn.Module, cls: type[nn.Module], fields: dict[str, Any]
) -> Any:
    """Returns the same bound module under another class, with other fields.

    Scope, random keys and what flax keeps of the running call stay, which
    `nn.Module.clone` makes anew.
    """
    twin: Any = object.__new__(cls)
    vars(twin).update(vars(layer), **fields)
    return twin


def beside(
    layer: nn.Module, cls: type[nn.Module], fields: dict[str, Any]
) -> Any:
    """Returns another bound module on the scope of a layer, inside its call.

    In a scope where the layer has not taken the names yet, and as flax leaves
    a module whose compact method runs: `__call__` without its wrapper, see
    `unwrapped_call`, makes variables only there.
    """
    scope: Any = layer.scope
    twin: Any = cls(**fields, parent=scope.rewound(), name=layer.name)
    twin._state.in_compact_method = True
    return twin


def unwrapped_call(cls: type[nn.Module]) -> Any:
    """Returns `__call__` without what flax does around a method.

    Flax announces, captures and tabulates every call of a module, and has no
    public way past that. Without a wrapper, the method itself.
    """
    return getattr(cls.__call__, "__wrapped__", cls.__call__)


def shares_scope(layer: nn.Module) -> bool:
    """Whether a submodule has the scope of a bound module: nn.share_scope.

    Flax lists the submodules of a module nowhere in public.
    """
    parts = layer._state.children.values()
    return any(
        isinstance(part, nn.Module) and part.scope == layer.scope
        for part in parts
    )


def fields_and_parts(module: nn.Module) -> list[Any]:
    """Returns what a module holds, in setup too, but not what holds it.

    `dataclasses.fields` leaves out what setup assigns.
    """
    return [part for name, part in vars(module).items() if name not in _OUTSIDE]


@contextlib.contextmanager
def flagged(scopes: Iterable[Any], flags: dict[str, Any]) -> Iterator[None]:
    """Gives scopes, and those made in them, flags for a while.

    nn.jit keeps what it has traced by the flags of the scope, among others,
    and takes them at the root alone in public.
    """
    before = [(scope, scope.flags) for scope in scopes]
    for scope, old in before:
        scope.flags = {**old, **flags}
    try:
        yield
    finally:
        for scope, old in before:
            scope.flags = old


def become(node: Any, cls: type, attributes: dict[str, Any]) -> None:
    """Makes an nnx module one of another class, in place.

    So whatever refers to it stays as it is: lists, tuples, several owners,
    cycles. `nnx.recursive_map` is public, and makes a model anew.
    """
    node.__class__ = cls
    vars(node).clear()
    vars(node).update(attributes)
