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
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", aval)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


def axes_in_scope() -> list[Hashable]:
    """Returns the named axes of shard_map, pmap and vmap that are bound."""
    # Here, because it takes as long to import as all of the core together.
    import jax.extend.core

    core: Any = jax.extend.core  # its types leave this function out
    names: list[Hashable] = list(core.unsafe_get_axis_names_DO_NOT_USE())
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
    try:
        jax.lax.axis_size(names)
    except NameError:
        from jax._src import core

        extend = getattr(core, "extend_axis_env_nd", None)
        if extend is not None:
            found: contextlib.AbstractContextManager[Any] = extend(
                list(zip(names, sizes))
            )
            return found
    return contextlib.nullcontext()
