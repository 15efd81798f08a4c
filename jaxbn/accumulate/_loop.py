"""A loop over microbatches that holds one of them in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxbn._compat import vary_over, varying_axes, varying_axes_of_type

Values = dict[Any, Any]


class Stack(NamedTuple):
    """A value of every microbatch, in one array."""

    array: jax.Array
    axis: int = 0  # of the microbatches

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

    values: a Stack of what differs between microbatches, arrays for the rest.
    size: number of microbatches.
    axis_name: what their collectives call them; None: they have no name.
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


class Job(NamedTuple):
    """What to do for every microbatch.

    body: takes the number of a microbatch and its values of what is read;
      returns (what to sum, what to keep).
    reads: stacks.
    sums: types of what to sum.
    keeps: types of what to keep.
    places: something to keep -> one of reads that nobody needs afterwards, in
      whose place it is written.
    """

    body: Callable[[jax.Array, Values], tuple[Values, Values]]
    reads: Mapping[Any, Stack]
    sums: Mapping[Any, Any]
    keeps: Mapping[Any, Any]
    places: Mapping[Any, Any] = {}  # noqa: RUF012


def loop(
    job: Job,
    token: jax.Array,
    *,
    size: int,
    axis_name: Hashable,
) -> tuple[Values, dict[Any, Stack], jax.Array]:
    """Runs one microbatch after the other.

    Args:
      job: what to do.
      token: an integer; known when everything is done that comes before.
      size: number of microbatches.
      axis_name: their axis, which types may name; the results do not.

    Returns:
      (sums, what was kept, token).
    """
    totals = {
        key: _zeros(kind, (), axis_name, token)
        for key, kind in job.sums.items()
    }
    kept = {
        key: job.reads[job.places[key]].array
        if key in job.places
        else _zeros(kind, (size,), axis_name, token)
        for key, kind in job.keeps.items()
    }
    # What takes the place of something read is written a microbatch later, so
    # that all that is read comes after what is written. Else compilers copy the
    # stack for every microbatch.
    late = {
        key: Stack(kept[key]).at(_zero_after(token, varying_axes(kept[key])))
        for key in job.places
    }

    def step(index: jax.Array, state: Any) -> Any:
        totals, kept, late = state
        index = index.astype(jnp.int32)
        kept = {**kept, **_written(kept, late, jnp.maximum(index - 1, 0))}
        reads = dict(job.reads)
        for key, old in job.places.items():
            reads[old] = Stack(kept[key])
        values = {key: stack.at(index) for key, stack in reads.items()}
        more, new = job.body(index, values)
        totals = {key: totals[key] + more[key] for key in totals}
        late = {key: new.pop(key) for key in late}
        return totals, {**kept, **_written(kept, new, index)}, late

    totals, kept, late = jax.lax.fori_loop(0, size, step, (totals, kept, late))
    kept.update(_written(kept, late, size - 1))
    stacks = {key: Stack(array) for key, array in kept.items()}
    return totals, stacks, _known_after(totals, kept)


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
    """Returns zeros of a type, made after token is known.

    Else compilers make room for them when the program starts.
    """
    over = varying_axes_of_type(kind) - {axis_name}
    shape = (*size, *kind.shape)
    if not _is_plain(kind.dtype):
        return vary_over(jnp.zeros(shape, kind.dtype), over)
    zero = _zero_after(token, over)
    spec = _explicit_spec(kind)
    array = jax.lax.broadcast(
        zero.astype(kind.dtype),
        shape,
        out_sharding=spec and PartitionSpec(*(None for _ in size), *spec),
    )
    return vary_over(array, over)


def _is_plain(dtype: Any) -> bool:
    """Returns whether a dtype holds numbers, not random keys."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def _explicit_spec(kind: Any) -> PartitionSpec | None:
    """Returns how a type says that its values are sharded, if it does."""
    sharding: Any = getattr(kind, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    spec: PartitionSpec = sharding.spec
    return spec


def _known_after(totals: Values, kept: Values) -> jax.Array:
    """Returns an integer that is known once the arrays are."""
    # All come out of one loop, so any will do. Sums are small, and the same on
    # all devices.
    for array in (*totals.values(), *kept.values()):
        sharded = any(_explicit_spec(jax.typeof(array)) or ())
        if array.size and _is_plain(array.dtype) and not sharded:
            token: jax.Array = array[(0,) * array.ndim] != 0
            return token.astype(jnp.int32)
    return jnp.zeros((), jnp.int32)


def _zero_after(token: jax.Array, over: Set[Hashable]) -> jax.Array:
    """Returns 0, but compilers think that it hangs on token.

    An optimization_barrier says so too, but is gone before operations are put
    in order. A token that varies over other axes than `over` would make what
    is made of it do so.
    """
    if not varying_axes(token) <= over:
        token = jnp.zeros((), jnp.int32)
    return jnp.minimum(token, 0)  # a token is never negative
