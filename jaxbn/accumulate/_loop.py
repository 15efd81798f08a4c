"""A loop over microbatches that holds one of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxbn.accumulate._types import varies_over, vary, varying

Values = dict[Any, Any]


class Stack(NamedTuple):
    """A value of every microbatch, in one array or in a list of them."""

    array: jax.Array | list[jax.Array]
    axis: int = 0  # of the microbatches, in one array

    def at(self, index: int | jax.Array, token: jax.Array | None) -> jax.Array:
        """Returns the value of a microbatch, read after token is known."""
        if isinstance(self.array, list):
            return _tied(self.array[index], token)
        if token is not None and varies_over(token) <= varies_over(self.array):
            index = _hidden(index, token)
        value: jax.Array = jax.lax.dynamic_index_in_dim(
            self.array, index, self.axis, keepdims=False
        )
        return value

    def together(self) -> jax.Array:
        """Returns the values along a new first axis."""
        if isinstance(self.array, list):
            return jnp.stack(self.array)
        return jnp.moveaxis(self.array, self.axis, 0)


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
    unroll: bool,
) -> tuple[Values, dict[Any, Stack], jax.Array]:
    """Runs one microbatch after the other.

    Args:
      job: what to do.
      token: an integer; known when everything is done that comes before.
      size: number of microbatches.
      axis_name: their axis, which types may name; the results do not.
      unroll: writes the body size times in place of a loop.

    Returns:
      (sums, what was kept, token).
    """
    if unroll:
        return _unrolled(job, token, size)
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
    in_place = set(job.places.values())

    def step(state: Any, index: jax.Array) -> tuple[Any, None]:
        totals, kept = state
        values = {
            key: stack.at(index, None)
            for key, stack in job.reads.items()
            if key not in in_place
        }
        for key, old in job.places.items():
            values[old] = Stack(kept[key]).at(index, None)
        more, new = job.body(index, values)
        totals = {key: totals[key] + more[key] for key in totals}
        update = jax.lax.dynamic_update_index_in_dim
        kept = {key: update(kept[key], new[key], index, 0) for key in kept}
        return (totals, kept), None

    indices = jnp.arange(size, dtype=jnp.int32)
    (totals, kept), _ = jax.lax.scan(step, (totals, kept), indices)
    stacks = {key: Stack(array) for key, array in kept.items()}
    return totals, stacks, _known_after(totals, kept)


def _unrolled(
    job: Job, token: jax.Array, size: int
) -> tuple[Values, dict[Any, Stack], jax.Array]:
    totals: Values = {}
    kept: list[Values] = []
    for i in range(size):
        values = {key: stack.at(i, token) for key, stack in job.reads.items()}
        more, new = job.body(jnp.int32(i), values)
        more, new = jax.lax.optimization_barrier((more, new))
        if i:
            more = {key: totals[key] + more[key] for key in totals}
        totals = more
        kept.append(new)
        token = _known_after(totals, new)
    stacks = {key: Stack([new[key] for new in kept]) for key in job.keeps}
    return totals, stacks, token


def _zeros(
    kind: Any, size: tuple[int, ...], axis_name: Hashable, token: jax.Array
) -> jax.Array:
    """Returns zeros of a type, made after token is known.

    Else compilers make room for them when the program starts.
    """
    over = varying(kind) - {axis_name}
    shape = (*size, *kind.shape)
    if not _is_plain(kind.dtype):
        return vary(jnp.zeros(shape, kind.dtype), over)
    zero = jnp.int32(0)
    if varies_over(token) <= over:
        zero = _hidden(0, token)
    spec = _explicit_spec(kind)
    zeros = jax.lax.broadcast(
        zero.astype(kind.dtype),
        shape,
        out_sharding=spec and PartitionSpec(*(None for _ in size), *spec),
    )
    return vary(zeros, over)


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
    token: jax.Array = jnp.int32(0)
    # What is kept is as a rule on the way to what is summed, which is small,
    # and the same on all devices.
    for array in (totals or kept).values():
        numeric = _is_plain(array.dtype)
        sharded = any(_explicit_spec(jax.typeof(array)) or ())
        if array.size and numeric and not sharded:
            first = array[(0,) * array.ndim]
            token = token + (first != 0).astype(jnp.int32)
    return token


def _hidden(number: int | jax.Array, token: jax.Array) -> jax.Array:
    """Returns number, but compilers think that it hangs on token.

    An optimization_barrier says so too, but is gone before operations are put
    in order. Free to choose, some interleave the microbatches and hold all of
    them in memory.
    """
    number = jnp.int32(number)
    return jax.lax.clamp(number, token, number)


def _tied(x: jax.Array, token: jax.Array | None) -> jax.Array:
    if token is None or not _is_plain(x.dtype):
        return x
    if not varies_over(token) <= varies_over(x):
        return x
    return jnp.where(_hidden(0, token) == 0, x, jnp.zeros_like(x))
