"""Traces a function of one microbatch to a program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from jaxbn._collectives import lockstep
from jaxbn._compat import (
    mesh_with_axis,
    types_say_varying,
    vary_over,
    varying_axes,
)
from jaxbn._compat.jaxprs import Equation, bind, is_literal
from jaxbn._jaxpr import (
    ELEMENTWISE,
    MOVES,
    REBUILT,
    called,
    interpret,
    rebuild,
)
from jaxbn.accumulate._collectives import (
    add_collective,
    communicates,
    communicates_inside,
    refuse,
)
from jaxbn.accumulate._control_flow import add_branches, add_scan
from jaxbn.accumulate._convolutions import convolve
from jaxbn.accumulate._loop import Inputs
from jaxbn.accumulate._nodes import Program, Site
from jaxbn.accumulate._run import evaluate

# Primitives that cost at most one pass over their inputs. Others run once.
_CHEAP_NAMES = (
    "acos acosh add_any and asin asinh atan atan2 atanh bitcast_convert_type "
    "ceil complex concatenate conj copy_p cos cosh eq erf erf_inv erfc floor "
    "ge gt imag iota is_finite le lt ne nextafter not or pad population_count "
    "random_bits random_clone random_fold_in random_seed random_split "
    "random_unwrap random_wrap real reduce_precision rem round shift_left "
    "shift_right_arithmetic shift_right_logical sin sinh slice split stack tan "
    "threefry2x32 xor"
)
# Resharding may communicate, so it is not cheap.
_CHEAP = (ELEMENTWISE | MOVES | {*_CHEAP_NAMES.split()}) - {
    "sharding_constraint"
}


def trace(fn: Callable[..., Any], inputs: Inputs) -> tuple[Program, Any]:
    """Traces fn for one microbatch, with the name of the axis in scope.

    Args:
      fn: function of the inputs of one microbatch.
      inputs: inputs of all microbatches.

    Returns:
      (Program, structure of the outputs of fn).
    """
    axis_name, size = inputs.axis_name, inputs.size
    make: Callable[..., Any] = functools.partial(
        jax.make_jaxpr, return_shape=True
    )
    if axis_name is None:
        closed, shapes = make(fn)(*inputs.of(0))
    else:
        make = functools.partial(make, axis_env=[(axis_name, size)])
        with lockstep(axis_name):
            if types_say_varying():
                closed, shapes = _trace_typed(make, fn, inputs)
            else:
                closed, shapes = make(fn)(*inputs.of(0))
    program = Program(axis_name, size)
    program.inputs = [
        program.value(var.aval, stacked)
        for var, stacked in zip(closed.jaxpr.invars, inputs.stacked())
    ]
    program.outputs = _inline(program, closed, program.inputs, 0)
    return program, jax.tree.structure(shapes)


def _trace_typed(
    make: Callable[..., Any], fn: Callable[..., Any], inputs: Inputs
) -> Any:
    """Traces under shard_map with check_vma=True.

    There the axis of a collective must be in the mesh. Nothing runs on the mesh
    with this axis; equations are evaluated on the real mesh, without it.
    """
    axis = {inputs.axis_name}
    examples = inputs.of(0)
    over = [
        varying_axes(example) | (axis if stacked else set())
        for example, stacked in zip(examples, inputs.stacked())
    ]

    def typed(*plain: jax.Array) -> Any:
        return fn(*map(vary_over, plain, over))

    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in examples]
    closed_over = (
        "Under shard_map with check_vma=True a function in lockstep cannot "
        "read arrays of the function around it: pass them as arguments."
    )
    with mesh_with_axis(inputs.axis_name, inputs.size, closed_over=closed_over):
        return make(typed)(*plain)


def _inline(
    program: Program, code: Any, inputs: Sequence[int], floor: int
) -> list[int]:
    """Appends all equations, of at least level floor; returns the outputs."""

    def equation(eqn: Equation, given: list[int]) -> list[int]:
        return _equation(Site(program, eqn, given, floor))

    def constant(atom: Any, array: Any) -> int:
        if is_literal(atom):
            # Plain, because a jax.Array has the mesh it was traced on.
            array = np.asarray(array, atom.aval.dtype)
        return program.constant(array, atom.aval)

    return interpret(code, inputs, equation, constant)


def _equation(site: Site) -> list[int]:
    program, eqn, inputs, floor = site
    name, params = site.name, site.params
    body = called(eqn)
    if body is not None:
        if params.get("differentiated"):
            # jax.checkpoint: recomputed once the cotangent is known, instead of
            # kept from the forward pass.
            floor = max([floor, *(program.levels[i] for i in inputs)])
            if params.get("prevent_cse"):
                inputs = _add_barriers(program, inputs, floor)
        return _inline(program, body, inputs, floor)
    if name == "name":  # a label for policies of jax.checkpoint
        return list(inputs)
    if name == "optimization_barrier":
        return _add_barriers(program, inputs, floor)
    if name == "pvary":
        rest = site.other_axes
        if not rest:
            return list(inputs)
        return site.add(functools.partial(_vary, rest), cheap=True)
    if communicates(eqn, program.axis_name):
        return add_collective(site)
    if communicates_inside(site):
        if name == "cond" and not program.stacked[inputs[0]]:
            return add_branches(site, _inline)
        if name == "scan":
            return add_scan(site, _inline)
        refuse(site)
    run: Callable[..., list[Any]]
    if name == "conv_general_dilated":
        run = functools.partial(convolve, eqn.primitive, params)
    elif name in REBUILT and types_say_varying():
        # Types in its body include the axis; see _trace_typed.
        run = functools.partial(
            rebuild, eqn, functools.partial(_evaluate, program)
        )
    else:
        params = _on_real_mesh(program, params)
        run = functools.partial(bind, eqn.primitive, params)
    return site.add(run, cheap=name in _CHEAP)


def _on_real_mesh(program: Program, params: dict[str, Any]) -> dict[str, Any]:
    """Removes the axis of microbatches from shardings; see _trace_typed."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        key: jax.sharding.NamedSharding(mesh, value.spec)
        if isinstance(value, jax.sharding.NamedSharding)
        and program.axis_name in value.mesh.axis_names
        else value
        for key, value in params.items()
    }


def _add_barriers(
    program: Program, inputs: Sequence[int], floor: int
) -> list[int]:
    """Appends a barrier for each value, so that shared values stay shared."""
    add = functools.partial(program.add, _barrier, cheap=True, floor=floor)
    return [out for i in inputs for out in add([i], [program.kinds[i]])]


def _barrier(x: jax.Array) -> list[jax.Array]:
    return [jax.lax.optimization_barrier(x)]


def _vary(over: tuple[Hashable, ...], x: jax.Array) -> list[jax.Array]:
    return [vary_over(x, over)]


def _evaluate(program: Program, code: Any, *inputs: Any) -> list[Any]:
    """Evaluates code whose types include the axis of microbatches."""
    inner = Program(program.axis_name, program.size)
    inner.inputs = [inner.value(jax.typeof(x), False) for x in inputs]
    inner.outputs = _inline(inner, code, inner.inputs, 0)
    return evaluate(inner, inputs)
