"""Over which mesh axes values vary, where their types say so."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax

from jaxbn._compat import varying_axes_of_type


def is_typed() -> bool:
    """Returns whether types say over which mesh axes values vary.

    They do under shard_map with check_vma=True.
    """
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    if not manual:
        return False
    return bool(varies_over(jax.lax.pcast(0.0, manual, to="varying")))


def varies_over(x: jax.Array) -> set[Hashable]:
    """Returns the mesh axes that the type of x says it varies over."""
    return varying(jax.typeof(x))


def varying(kind: Any) -> set[Hashable]:
    """Returns the mesh axes that values of a type vary over."""
    return set(varying_axes_of_type(kind))


def vary(x: jax.Array, over: Iterable[Hashable]) -> jax.Array:
    """Marks x as varying over these mesh axes too."""
    more = tuple(set(over) - varies_over(x))
    return jax.lax.pcast(x, more, to="varying") if more else x
