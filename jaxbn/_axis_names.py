"""Resolves names of mapped axes."""

from __future__ import annotations

import difflib
from collections.abc import Hashable

import jax

from jaxbn._compat import Names, axes_in_scope, is_bound

AxisName = Hashable | tuple[Hashable, ...] | None


def all_names(axis_name: AxisName) -> Names:
    """Returns the names as a tuple; as in `jax.lax.psum`, a list is one too."""
    if axis_name is None:
        return ()
    if isinstance(axis_name, (tuple, list)):
        return tuple(axis_name)
    return (axis_name,)


def bound_axes(axis_name: AxisName) -> Names:
    """Returns the named axes to reduce over; () if x is global already.

    Outside shard_map, pmap and vmap(axis_name=...) no axis is bound, and arrays
    are global. The same holds for mesh axes that shard_map leaves automatic,
    and for models under vmap over another axis. Any other unbound name is an
    error that would leave statistics unsynchronized.
    """
    names = all_names(axis_name)
    bound = tuple(name for name in names if is_bound(name))
    for name in names:
        if name not in bound:
            _check_global(name, axis_name)
    return bound


def _check_global(name: Hashable, axis_name: AxisName) -> None:
    """Raises ValueError unless x may be global along an unbound axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if name in mesh.axis_names and name not in mesh.manual_axes:
        return
    in_scope = sorted(map(str, axes_in_scope()))
    # Under vmap, a name similar to one in scope is a typo.
    alike = difflib.get_close_matches(str(name), in_scope, cutoff=0.7)
    if mesh.manual_axes or alike:
        raise ValueError(
            f"axis_name={axis_name!r}: {name!r} is not bound here; the "
            f"named axes in scope are {in_scope}. Use one of them, or None for "
            "statistics of this device only."
        )
