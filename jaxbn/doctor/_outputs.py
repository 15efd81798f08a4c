"""How far the outputs of a model in training and in inference differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp


def squared_norms(
    trained: Any, inferred: Any
) -> tuple[jax.Array, jax.Array] | None:
    """Returns squared norms of the difference and of the output in training.

    A model may return more in one mode than in the other, such as (y, aux) and
    y. What is compared is then the first part of the one that has the
    structure and the shapes of the other, or else the leaves that lie in the
    same place of both.

    Args:
      trained: output in training, a pytree.
      inferred: output in inference.

    Returns:
      Two scalars, or None where no part of the outputs is comparable. Integers
      and booleans count where nothing is floating.
    """
    pair = _matching_part(trained, inferred) or _common_leaves(
        trained, inferred
    )
    leaves = [*zip(*map(jax.tree.leaves, pair))]
    floating = [p for p in leaves if jnp.issubdtype(p[0].dtype, jnp.inexact)]
    leaves = floating or [p for p in leaves if _is_number(p[0])]
    if not leaves:
        return None
    wide = [[_widened(a) for a in pair] for pair in leaves]
    apart = sum((abs(a - b) ** 2).sum() for a, b in wide)
    size = sum((abs(a) ** 2).sum() for a, _ in wide)
    return cast("jax.Array", apart), cast("jax.Array", size)


def _matching_part(trained: Any, inferred: Any) -> tuple[Any, Any] | None:
    """Returns parts of one structure, the whole if it can be."""
    if _shape(trained) == _shape(inferred):
        pair: tuple[Any, Any] = jax.tree.map(jnp.asarray, (trained, inferred))
        return pair
    for part in _children(trained):
        if (found := _matching_part(part, inferred)) is not None:
            return found
    for part in _children(inferred):
        if (found := _matching_part(trained, part)) is not None:
            return found
    return None


def _common_leaves(trained: Any, inferred: Any) -> tuple[Any, Any]:
    """Returns the leaves of one path and shape, by path."""
    a, b = (
        {path: jnp.asarray(leaf) for path, leaf in found}
        for found in map(jax.tree.leaves_with_path, (trained, inferred))
    )
    both = [path for path in a if path in b and a[path].shape == b[path].shape]
    return [a[path] for path in both], [b[path] for path in both]


def _shape(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [jnp.shape(leaf) for leaf in leaves]


def _children(tree: Any) -> Sequence[Any]:
    if isinstance(tree, Mapping):
        return list(tree.values())
    return tree if isinstance(tree, (tuple, list)) else ()


def _is_number(leaf: jax.Array) -> bool:
    return leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number)


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
