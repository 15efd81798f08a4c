"""A loop over microbatches, with one of them in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxbn._compat import (
    explicit_spec,
    vary_over,
    varying_axes,
    varying_axes_of_type,
)
from jaxbn.accumulate._nodes import Program
from jaxbn.accumulate._plan import Segment

Values = dict[int, Any]


class Stack(NamedTuple):
    """The values of all microbatches, in one array."""

    array: jax.Array
    axis: int = 0  # axis of the microbatches

    def at(self, index: int | jax.Array) -> jax.Array:
        """Returns the value of a microbatch."""
        value: jax.Array = jax.lax.dynamic_index_in_dim(
            self.array,
            index,
            self.axis,
            keepdims=False,
            allow_negative_indices=False,
        )
        return value

    def together(self) -> jax.Array:
        """Returns the values along a new first axis."""
        return jnp.moveaxis(self.array, self.axis, 0)


class Inputs(NamedTuple):
    """The arguments of all microbatches.

    values: a Stack where microbatches differ, otherwise an array.
    size: number of microbatches.
    axis_name: name of their axis, or None without collectives over it.
    """

    values: Sequence[jax.Array | Stack]
    size: int
    axis_name: Hashable

    def stacked(self) -> list[bool]:
        return [isinstance(value, Stack) for value in self.values]

    def of(self, index: int | jax.Array) -> list[jax.Array]:
        """Returns the arguments of one microbatch."""
        return [
            value.at(index) if isinstance(value, Stack) else value
            for value in self.values
        ]


def loop(
    program: Program,
    segment: Segment,
    body: Callable[[jax.Array, Values], Values],
    stacks: Mapping[int, Stack],
    token: jax.Array,
) -> tuple[Values, dict[int, Stack], jax.Array]:
    """Runs a segment, one microbatch after the other.

    Args:
      program: program of the segment.
      segment: which values are read, summed and kept.
      body: (index of a microbatch, its values that are read) -> its values
        that are summed and kept.
      stacks: the values that are read.
      token: integer that depends on everything computed before.

    Returns:
      (sums, kept values, token).
    """
    size, kinds, places = program.size, program.kinds, segment.places
    zeros = functools.partial(_zeros, axis_name=program.axis_name, token=token)
    totals = {i: zeros(kinds[i], ()) for i in segment.sums}
    kept = {
        i: stacks[places[i]].array if i in places else zeros(kinds[i], (size,))
        for i in segment.keeps
    }
    # A value that overwrites one that is read is written one microbatch later,
    # so that reads follow writes. Otherwise compilers copy the stack in every
    # iteration.
    late = {
        i: Stack(kept[i]).at(_zero_after(token, varying_axes(kept[i])))
        for i in places
    }

    def step(index: jax.Array, state: Any) -> Any:
        totals, kept, late = state
        index = index.astype(jnp.int32)
        kept = {**kept, **_written(kept, late, jnp.maximum(index - 1, 0))}
        written = {old: Stack(kept[i]) for i, old in places.items()}
        reads = {i: stacks[i] for i in segment.reads if i != program.index}
        reads |= written
        new = body(index, {i: stack.at(index) for i, stack in reads.items()})
        totals = {i: totals[i] + new[i] for i in totals}
        now = {i: new[i] for i in kept if i not in places}
        kept = {**kept, **_written(kept, now, index)}
        return totals, kept, {i: new[i] for i in places}

    totals, kept, late = jax.lax.fori_loop(0, size, step, (totals, kept, late))
    kept.update(_written(kept, late, size - 1))
    found = {i: Stack(array) for i, array in kept.items()}
    return totals, found, _known_after(totals, kept)


def _written(stacks: Values, values: Values, index: int | jax.Array) -> Values:
    update = functools.partial(
        jax.lax.dynamic_update_index_in_dim, allow_negative_indices=False
    )
    return {
        key: update(stacks[key], value, index, 0)
        for key, value in values.items()
    }


def _zeros(
    kind: Any, size: tuple[int, ...], axis_name: Hashable, token: jax.Array
) -> jax.Array:
    """Returns zeros of a type, which depend on token.

    Otherwise compilers allocate them at the start of the program.
    """
    over = varying_axes_of_type(kind) - {axis_name}
    shape = (*size, *kind.shape)
    if not _is_plain(kind.dtype):
        return vary_over(jnp.zeros(shape, kind.dtype), over)
    zero = _zero_after(token, over)
    spec = explicit_spec(kind)
    array = jax.lax.broadcast(
        zero.astype(kind.dtype),
        shape,
        out_sharding=spec and PartitionSpec(*(None for _ in size), *spec),
    )
    return vary_over(array, over)


def _is_plain(dtype: Any) -> bool:
    """Returns whether a dtype is numeric or bool, not that of random keys."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def _known_after(totals: Values, kept: Values) -> jax.Array:
    """Returns an integer that depends on the results of a loop."""
    # All are results of the same loop, so any of them will do. Sums are small,
    # and equal on all devices.
    for array in (*totals.values(), *kept.values()):
        sharded = any(explicit_spec(jax.typeof(array)) or ())
        if array.size and _is_plain(array.dtype) and not sharded:
            token: jax.Array = array[(0,) * array.ndim] != 0
            return token.astype(jnp.int32)
    return jnp.zeros((), jnp.int32)


def _zero_after(token: jax.Array, over: Set[Hashable]) -> jax.Array:
    """Returns 0, which depends on token as far as compilers know.

    An optimization_barrier would do that too, but is removed before operations
    are scheduled. A token that varies over axes other than `over` is ignored,
    since its result would also vary over them.
    """
    if not varying_axes(token) <= over:
        token = jnp.zeros((), jnp.int32)
    return jnp.minimum(token, 0)  # a token is never negative
