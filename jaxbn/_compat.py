"""Calls into JAX that are private, or that differ between its versions."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import jax

Names = tuple[Hashable, ...]


def varying_axes(x: jax.Array) -> frozenset[Hashable]:
    """Returns the mesh axes over which x is known to differ.

    Under shard_map with check_vma=True; the empty set elsewhere. jax 0.11 moved
    it from `vma` to `manual_axis_type.varying`.
    """
    return varying_axes_of_type(jax.typeof(x))


def varying_axes_of_type(kind: Any) -> frozenset[Hashable]:
    """Returns the mesh axes over which values of a type differ."""
    kind = getattr(kind, "manual_axis_type", kind)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


def match_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns x with the type of an array of its shape.

    That is: varying over the same axes of shard_map with check_vma=True, and
    sharded in the same way over Explicit mesh axes.
    """
    more = varying_axes(like) - varying_axes(x)
    if more:
        x = jax.lax.pcast(x, tuple(more), to="varying")
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, jax.typeof(like).sharding.spec)
    return x


def is_bound(name: Hashable) -> bool:
    """Whether a name is that of a mapped axis around the caller."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def axes_in_scope() -> list[Hashable]:
    """Returns the named axes that are bound, for error messages."""
    # Here, because it takes as long to import as all of the core together.
    import jax.extend.core

    core: Any = jax.extend.core  # its types leave this function out
    ask = getattr(core, "unsafe_get_axis_names_DO_NOT_USE", list)
    names: list[Hashable] = list(ask())
    return names


def bind_axes(
    names: Names, sizes: tuple[int, ...]
) -> contextlib.AbstractContextManager[Any]:
    """Binds named axes again where JAX has forgotten them.

    JAX calls the derivative rule of a `custom_jvp` function when it
    differentiates. With `vmap(axis_name=...)` inside of `jit`, `checkpoint` or
    `scan`, that is after vmap has returned: collectives in the rule are still
    mapped, yet the check of their names fails.
    """
    if not all(map(is_bound, names)):
        from jax._src import core

        extend = getattr(core, "extend_axis_env_nd", None)
        if extend is not None:
            found: contextlib.AbstractContextManager[Any] = extend(
                list(zip(names, sizes))
            )
            return found
    return contextlib.nullcontext()
