"""Compares the outputs of a model in training and inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp


def squared_norms(
    trained: Any, inferred: Any
) -> tuple[jax.Array, jax.Array] | None:
    """Returns squared norms of the difference and of the output in training.

    A model may return more in one mode, such as (y, aux) and y. Then the first
    part of one output with the structure and shapes of the other is compared,
    or else the leaves with equal paths and shapes.

    Args:
      trained: output in training, a pytree.
      inferred: output in inference.

    Returns:
      Two scalars, or None if nothing is comparable. Integers and booleans are
      compared only if there are no floating leaves.
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
    difference = sum((abs(a - b) ** 2).sum() for a, b in wide)
    size = sum((abs(a) ** 2).sum() for a, _ in wide)
    return cast("jax.Array", difference), cast("jax.Array", size)


def _matching_part(trained: Any, inferred: Any) -> tuple[Any, Any] | None:
    """Returns matching parts of both, the whole outputs if possible."""
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
    """Returns the leaves with equal paths and shapes."""
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
