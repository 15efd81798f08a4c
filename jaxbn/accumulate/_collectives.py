"""Collectives over the microbatches: where lockstep cuts a program."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxbn.accumulate._nodes import Program


def named_axes(eqn: jex.JaxprEqn) -> tuple[Hashable, ...]:
    """Returns the named axes that an equation communicates over."""
    if eqn.primitive.name == "pvary":  # tells types something, no more
        return ()
    return _axes(eqn)


def other_axes(program: Program, eqn: jex.JaxprEqn) -> tuple[Hashable, ...]:
    """Returns the axes of an equation besides that of the microbatches."""
    return tuple(a for a in _axes(eqn) if a != program.axis_name)


def _axes(eqn: jex.JaxprEqn) -> tuple[Hashable, ...]:
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return axes if isinstance(axes, tuple) else (axes,)


def inner_equations(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """Returns all equations, those inside of others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from inner_equations(inner)


def communicates_inside(program: Program, eqn: jex.JaxprEqn) -> bool:
    """Whether code that an equation holds is over the microbatches."""
    return any(
        program.axis_name in named_axes(inner)
        for jaxpr in jex.jaxprs_in_params(eqn.params)
        for inner in inner_equations(jaxpr)
    )


def refuse(program: Program, eqn: jex.JaxprEqn) -> None:
    """Raises ValueError with the layer that stands where nothing can be cut."""
    for jaxpr in jex.jaxprs_in_params(eqn.params):
        for inner, scopes in _inner_scopes(jaxpr, _scopes(eqn)):
            if program.axis_name in named_axes(inner):
                of = f", of layer {'/'.join(scopes)!r}," if scopes else ""
                raise ValueError(
                    f"{inner.primitive.name} over {program.axis_name!r}{of} "
                    f"stands inside {eqn.primitive.name}, which cannot be cut "
                    "there. Write the loop or the branch in Python, or keep "
                    "layers that synchronize out of it."
                )


def _inner_scopes(
    jaxpr: jex.Jaxpr, scopes: tuple[str, ...]
) -> Iterator[tuple[jex.JaxprEqn, tuple[str, ...]]]:
    """Returns all equations, with the names of the modules they belong to."""
    for eqn in jaxpr.eqns:
        here = scopes + _scopes(eqn)
        yield eqn, here
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _inner_scopes(inner, here)


def _scopes(eqn: jex.JaxprEqn) -> tuple[str, ...]:
    # Names of jax.named_scope, as flax sets them; transformations wrap them.
    found = str(eqn.source_info.name_stack).split("/")
    names = (re.sub(r"^(\w+\()+|\)+$", "", name) for name in found)
    return tuple(name for name in names if name)


def bind(
    primitive: jex.Primitive, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    """Evaluates an equation."""
    # Some versions of JAX return functions apart, some among the params.
    bound = primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = primitive.bind(*functions, *inputs, **params)
    return list(out) if primitive.multiple_results else [out]


def add_collective(
    program: Program, eqn: jex.JaxprEqn, inputs: list[int], floor: int
) -> list[int]:
    """Appends an equation over the microbatches; returns its outputs.

    Args:
      program: it grows.
      eqn: the equation.
      inputs: values it reads.
      floor: the least level it may have.

    Raises:
      ValueError: a collective that does not run in lockstep.
    """
    name, params = eqn.primitive.name, eqn.params
    kinds = [var.aval for var in eqn.outvars]
    grouped = params.get("axis_index_groups") is not None
    rest = other_axes(program, eqn)

    def over_rest(x: jax.Array) -> list[jax.Array]:
        if not rest:
            return [x]
        return bind(eqn.primitive, {**params, "axes": rest}, x)

    def times_size(x: jax.Array) -> list[jax.Array]:
        return over_rest(x * np.asarray(program.size, x.dtype))

    if name == "axis_index":
        return [program.index]
    ways = {
        "psum": ("sum", over_rest, times_size),
        "psum_invariant": ("sum", over_rest, times_size),
        "pmax": ("stack", lambda x: over_rest(jnp.max(x, 0)), over_rest),
        "pmin": ("stack", lambda x: over_rest(jnp.min(x, 0)), over_rest),
    }
    if name in ways and not grouped:
        collective, run, run_unstacked = ways[name]
        if not program.stacked[inputs[0]]:
            return program.add(name, run_unstacked, inputs, kinds, floor=floor)
    elif name == "all_gather":
        collective, run = "stack", functools.partial(_all_gather, program, eqn)
    elif name == "reduce_scatter":
        collective = "stack"
        run = functools.partial(_reduce_scatter, program, eqn)
    else:
        raise ValueError(
            f"{name}{' with axis_index_groups' if grouped else ''} over "
            f"{program.axis_name!r} does not run in lockstep; psum, pmean, "
            "pmax, pmin, all_gather, psum_scatter and axis_index do."
        )
    return program.add_collective(
        name,
        run,
        inputs,
        kinds,
        collective=collective,
        floor=floor,
        stacked=[grouped or name == "reduce_scatter"],
    )


def _all_gather(
    program: Program, eqn: jex.JaxprEqn, stack: jax.Array
) -> list[jax.Array]:
    axis, tiled = eqn.params["all_gather_dimension"], eqn.params["tiled"]
    shape = stack.shape[1:]
    everyone = _everyone(program, eqn, stack)

    def place(members: jax.Array) -> jax.Array:
        placed = jnp.moveaxis(members, 0, axis)
        if tiled:
            placed = placed.reshape(*shape[:axis], -1, *shape[axis + 1 :])
        return placed

    if eqn.params["axis_index_groups"] is None:
        return [place(everyone)]
    members, _ = _groups(program, eqn)
    return [jax.vmap(place)(everyone[members])]


def _reduce_scatter(
    program: Program, eqn: jex.JaxprEqn, stack: jax.Array
) -> list[jax.Array]:
    axis, tiled = eqn.params["scatter_dimension"], eqn.params["tiled"]
    members, position = _groups(program, eqn)
    totals = _everyone(program, eqn, stack)[members].sum(1)

    def own(total: jax.Array, position: jax.Array) -> jax.Array:
        pieces = members.shape[1]
        length = total.shape[axis] // pieces
        piece = jax.lax.dynamic_slice_in_dim(
            total, position * length, length, axis
        )
        return piece if tiled else piece.squeeze(axis)

    return [jax.vmap(own)(totals, position)]


def _everyone(
    program: Program, eqn: jex.JaxprEqn, stack: jax.Array
) -> jax.Array:
    """Gathers (microbatches, *shape) over the other axes too, (n, *shape)."""
    rest = other_axes(program, eqn)
    at = named_axes(eqn).index(program.axis_name)
    shape = stack.shape[1:]
    sizes = [jax.lax.axis_size(name) for name in rest]
    everyone = jax.lax.all_gather(stack, rest) if rest else stack
    everyone = everyone.reshape(*sizes, program.size, *shape)
    return jnp.moveaxis(everyone, len(rest), at).reshape(-1, *shape)


def _groups(program: Program, eqn: jex.JaxprEqn) -> tuple[jax.Array, jax.Array]:
    """Returns for every microbatch here its group, and its place in it."""
    own: int | jax.Array = 0
    count = 1
    for name in named_axes(eqn):
        if name == program.axis_name:
            index, size = jnp.arange(program.size), program.size
        else:
            index, size = jax.lax.axis_index(name), jax.lax.axis_size(name)
        own, count = own * size + index, count * size
    groups = eqn.params["axis_index_groups"] or [range(count)]
    group_of = {i: group for group in groups for i in group}
    members = jnp.array([tuple(group_of[i]) for i in range(count)])
    position = jnp.array([group_of[i].index(i) for i in range(count)])
    return members[own], position[own]
