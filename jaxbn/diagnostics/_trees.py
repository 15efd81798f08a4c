"""Vector operations on pytrees, and lookup of leaves by path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._checks import describe

# "block/dense/kernel", or its keys as a tuple.
Path = str | Sequence[str]


def dot(a: Any, b: Any) -> jax.Array:
    """Returns the inner product of two trees, in float32 or wider."""
    # Not jnp.vdot, which accelerators compute in lower precision.
    parts = jax.tree.map(lambda x, y: (widen(x) * widen(y)).sum(), a, b)
    return cast("jax.Array", sum(jax.tree.leaves(parts)))


def norm(a: Any) -> jax.Array:
    """Returns the Euclidean norm of a tree."""
    return jnp.sqrt(dot(a, a))


def subtract(a: Any, b: Any) -> Any:
    """Returns a - b."""
    return jax.tree.map(jnp.subtract, a, b)


def step_along(params: Any, step: jax.Array, direction: Any) -> Any:
    """Returns params - step * direction, in the dtypes of params."""
    return jax.tree.map(
        lambda p, d: p - (step * d).astype(p.dtype), params, direction
    )


def leaf_names(tree: Any) -> list[str]:
    """Returns the path of every leaf, in the order of `jax.tree.leaves`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in paths
    ]


def find_leaves(tree: Any, path: Path, *, what: str) -> list[int]:
    """Returns the indices of the leaves at and below path.

    Raises:
      ValueError: there is none; lists the existing paths.
    """
    path = path if isinstance(path, str) else "/".join(map(str, path))
    known = leaf_names(tree)
    found = [
        i
        for i, name in enumerate(known)
        if name == path or name.startswith(path + "/")
    ]
    if not found:
        raise ValueError(
            f"{what} has no {path!r}; it has {', '.join(known) or 'nothing'}."
        )
    return found


def find_leaf(tree: Any, path: Path, *, what: str) -> int:
    """Returns the index of the only leaf at or below path.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = find_leaves(tree, path, what=what)
    if len(found) > 1:
        known = leaf_names(tree)
        raise ValueError(
            f"{path!r} matches {len(found)} arrays of {what}: "
            f"{', '.join(known[i] for i in found)}. Select one of them."
        )
    return found[0]


def check_same_structure(
    tree: Any, other: Any, *, what: str, than: str
) -> None:
    """Raises ValueError unless both trees hold arrays of the same shapes."""
    mine, theirs = (
        dict(zip(leaf_names(t), jax.tree.leaves(t))) for t in (tree, other)
    )
    for name in [*theirs, *mine]:
        if name not in mine or name not in theirs:
            raise ValueError(
                f"{what} must have the structure of {than}, with "
                f"{', '.join(theirs)}; got {', '.join(mine)}."
            )
        if jnp.shape(mine[name]) != jnp.shape(theirs[name]):
            a, b = jnp.asarray(mine[name]), jnp.asarray(theirs[name])
            raise ValueError(
                f"{name!r} is {describe(a)} in {what} and {describe(b)} in "
                f"{than}."
            )


def channel_rows(leaf: jax.Array, feature_axis: int) -> jax.Array:
    """Reshapes a weight to one row per output channel, (C, fan-in)."""
    leaf = jnp.asarray(leaf)
    if not leaf.ndim or not -leaf.ndim <= feature_axis < leaf.ndim:
        raise ValueError(
            f"feature_axis={feature_axis} is not an axis of the weight, which "
            f"is {describe(leaf)}."
        )
    rows = jnp.moveaxis(widen(leaf), feature_axis, 0)
    return rows.reshape(len(rows), -1)
