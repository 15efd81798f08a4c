"""Collectives over microbatches, at which lockstep splits a program."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._compat.jaxprs import Equation, bind, bodies, named_axes, scopes
from jaxbn._jaxpr import equations
from jaxbn.accumulate._nodes import Site


def communicates(eqn: Equation, axis_name: Hashable) -> bool:
    """Returns whether an equation is a collective over the microbatches."""
    # pvary changes types only.
    return eqn.primitive.name != "pvary" and axis_name in named_axes(eqn)


def communicates_inside(site: Site) -> bool:
    """Returns whether a body of an equation has such a collective."""
    return any(
        communicates(inner, site.program.axis_name)
        for code in bodies(site.eqn)
        for inner in equations(code)
    )


def refuse(site: Site) -> None:
    """Raises ValueError if a collective cannot be split at; names its layer."""
    axis_name = site.program.axis_name
    for inner, names in _with_scopes(site.eqn, ()):
        if inner is not site.eqn and communicates(inner, axis_name):
            of = f", of layer {'/'.join(names)!r}," if names else ""
            raise ValueError(
                f"{inner.primitive.name} over {axis_name!r}{of} stands inside "
                f"{site.name}, which cannot be cut there. Write the loop or "
                "the branch in Python, or keep layers that synchronize out of "
                "it."
            )


def _with_scopes(
    eqn: Equation, outer: tuple[str, ...]
) -> Iterator[tuple[Equation, tuple[str, ...]]]:
    """Yields an equation and those in its bodies, with their modules."""
    names = outer + scopes(eqn)
    yield eqn, names
    for code in bodies(eqn):
        for inner in code.eqns:
            yield from _with_scopes(inner, names)


def add_collective(site: Site) -> list[int]:
    """Appends a collective over the microbatches; returns its outputs.

    Raises:
      ValueError: the collective does not run in lockstep.
    """
    program, name, rest = site.program, site.name, site.other_axes
    grouped = site.params.get("axis_index_groups") is not None

    def over_rest(x: jax.Array) -> list[jax.Array]:
        if not rest:
            return [x]
        return bind(site.eqn.primitive, {**site.params, "axes": rest}, x)

    def times_size(x: jax.Array) -> list[jax.Array]:
        return over_rest(x * np.asarray(program.size, x.dtype))

    if name == "axis_index":
        return [program.index]
    ways: dict[str, tuple[str, Any, Any]] = {
        "psum": ("sum", over_rest, times_size),
        "psum_invariant": ("sum", over_rest, times_size),
        "pmax": ("stack", lambda x: over_rest(jnp.max(x, 0)), over_rest),
        "pmin": ("stack", lambda x: over_rest(jnp.min(x, 0)), over_rest),
    }
    if name in ways and not grouped:
        collective, run, run_unstacked = ways[name]
        if not program.stacked[site.inputs[0]]:
            return site.add(run_unstacked)
    elif name in ("all_gather", "reduce_scatter"):
        way = _all_gather if name == "all_gather" else _reduce_scatter
        collective, run = "stack", functools.partial(way, site)
    else:
        raise ValueError(
            f"{name}{' with axis_index_groups' if grouped else ''} over "
            f"{program.axis_name!r} does not run in lockstep; psum, pmean, "
            "pmax, pmin, all_gather, psum_scatter and axis_index do."
        )
    stacked = [grouped or name == "reduce_scatter"]
    return site.add(run, collective=collective, stacked=stacked)


def _all_gather(site: Site, stack: jax.Array) -> list[jax.Array]:
    axis, tiled = site.params["all_gather_dimension"], site.params["tiled"]
    shape = stack.shape[1:]
    everyone = _everyone(site, stack)

    def place(members: jax.Array) -> jax.Array:
        placed = jnp.moveaxis(members, 0, axis)
        if tiled:
            placed = placed.reshape(*shape[:axis], -1, *shape[axis + 1 :])
        return placed

    if site.params["axis_index_groups"] is None:
        return [place(everyone)]
    members, _ = _groups(site)
    return [jax.vmap(place)(everyone[members])]


def _reduce_scatter(site: Site, stack: jax.Array) -> list[jax.Array]:
    axis, tiled = site.params["scatter_dimension"], site.params["tiled"]
    members, position = _groups(site)
    totals = _everyone(site, stack)[members].sum(1)

    def own(total: jax.Array, position: jax.Array) -> jax.Array:
        pieces = members.shape[1]
        length = total.shape[axis] // pieces
        piece = jax.lax.dynamic_slice_in_dim(
            total, position * length, length, axis
        )
        return piece if tiled else piece.squeeze(axis)

    return [jax.vmap(own)(totals, position)]


def _everyone(site: Site, stack: jax.Array) -> jax.Array:
    """Gathers (microbatches, *shape) over the other axes: (n, *shape)."""
    program, rest = site.program, site.other_axes
    at = named_axes(site.eqn).index(program.axis_name)
    shape = stack.shape[1:]
    sizes = [jax.lax.axis_size(name) for name in rest]
    everyone = jax.lax.all_gather(stack, rest) if rest else stack
    everyone = everyone.reshape(*sizes, program.size, *shape)
    return jnp.moveaxis(everyone, len(rest), at).reshape(-1, *shape)


def _groups(site: Site) -> tuple[jax.Array, jax.Array]:
    """Returns the group of each local microbatch, and its position in it."""
    own: int | jax.Array = 0
    count = 1
    for name in named_axes(site.eqn):
        if name == site.program.axis_name:
            size = site.program.size
            index = jnp.arange(size)
        else:
            index, size = jax.lax.axis_index(name), jax.lax.axis_size(name)
        own, count = own * size + index, count * size
    groups = site.params["axis_index_groups"] or [range(count)]
    group_of = {i: group for group in groups for i in group}
    members = jnp.array([tuple(group_of[i]) for i in range(count)])
    position = jnp.array([group_of[i].index(i) for i in range(count)])
    return members[own], position[own]
