"""`jax.vmap` with an axis name, in the memory of one row."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._checks import describe
from jaxbn.accumulate._loop import Inputs, Stack
from jaxbn.accumulate._run import evaluate
from jaxbn.accumulate._trace import trace


def lockstep(
    fn: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    axis_name: Hashable,
) -> Callable[..., Any]:
    """`jax.vmap` with an axis name that computes one row after the other.

    Returns the same as jax.vmap(fn, in_axes, out_axes, axis_name=axis_name).
    Between two collectives over axis_name the rows are computed in turn, so
    values that are not needed beyond the next collective are in memory for one
    row only. Values that are equal for all rows are computed once.

    Take derivatives inside fn: if it calls jax.grad, both passes are split at
    their collectives. Under shard_map, axes may be combined, as in ("data",
    "micro").

    Args:
      fn: function to map; see loss in `value_and_grad` for its restrictions.
      in_axes: an axis or None for each argument, or trees of them.
      out_axes: likewise for the outputs; None for outputs that rows share.
      axis_name: name of the axis of rows.

    Returns:
      Function of the arguments of fn.

    Raises:
      ValueError: in_axes or out_axes does not fit; the mapped axes are missing
        or differ in length; out_axes is None for an output that rows do not
        share; axis_name is already bound; or as in `value_and_grad`.
    """

    def mapped(*args: Any) -> Any:
        check_unbound(axis_name)
        leaves, treedef = jax.tree.flatten(args)
        given = tuple(in_axes) if isinstance(in_axes, list) else in_axes
        axes = _spread("in_axes", given, args)
        lengths = {
            jnp.shape(leaf)[axis]
            for leaf, axis in zip(leaves, axes)
            if axis is not None and -jnp.ndim(leaf) <= axis < jnp.ndim(leaf)
        }
        if len(lengths) != 1:
            raise ValueError(
                f"in_axes={in_axes} must name axes of one length; got "
                f"{sorted(lengths)} of {', '.join(map(describe, leaves))}."
            )
        (size,) = lengths
        values = [
            leaf if axis is None else Stack(leaf, axis % jnp.ndim(leaf))
            for leaf, axis in zip(leaves, axes)
        ]

        def flat(*leaves: jax.Array) -> Any:
            return fn(*jax.tree.unflatten(treedef, leaves))

        program, tree = trace(flat, Inputs(values, size, axis_name))
        numbers = program.outputs
        wanted = _spread(
            "out_axes", out_axes, jax.tree.unflatten(tree, numbers)
        )
        for number, axis in zip(numbers, wanted):
            if axis is None and program.stacked[number]:
                raise ValueError(
                    "out_axes is None for a result that rows do not share, "
                    f"{describe(program.kinds[number])} of each."
                )
        results = evaluate(program, values)
        out = [
            _place(array, program.stacked[number], axis, size)
            for array, number, axis in zip(results, numbers, wanted)
        ]
        return jax.tree.unflatten(tree, out)

    return mapped


def check_unbound(axis_name: Hashable) -> None:
    """Raises if axis_name is already bound."""
    try:
        size = jax.lax.axis_size(axis_name)
    except NameError:
        return
    raise ValueError(
        f"axis_name={axis_name!r} is bound here already, to an axis of length "
        f"{size}. Microbatches need a name of their own."
    )


def _spread(name: str, axes: Any, tree: Any) -> list[int | None]:
    """Returns the axis of each leaf of a tree."""

    def is_none(x: Any) -> bool:
        return x is None

    try:
        spread = jax.tree.broadcast(axes, tree, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(
            f"{name}={axes} does not fit {jax.tree.structure(tree)}."
        ) from error
    return jax.tree.leaves(spread, is_leaf=is_none)


def _place(
    array: jax.Array, stacked: bool, axis: int | None, size: int
) -> jax.Array:
    """Moves the axis of rows of a result to the requested axis."""
    if axis is None:
        return array
    if not stacked:
        array = jnp.broadcast_to(array, (size, *jnp.shape(array)))
    return jnp.moveaxis(array, 0, axis)
