"""From a function of one microbatch to its program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from jaxbn._collectives import lockstep
from jaxbn._compat import types_say_varying, vary_over, varying_axes
from jaxbn.accumulate._branches import add_branches
from jaxbn.accumulate._collectives import (
    add_collective,
    bind,
    communicates_inside,
    named_axes,
    other_axes,
    refuse,
)
from jaxbn.accumulate._convolutions import convolve
from jaxbn.accumulate._loop import Inputs
from jaxbn.accumulate._nodes import Program
from jaxbn.accumulate._rebuild import REBUILD
from jaxbn.accumulate._scans import add_scan

# Equations that only wrap the ones that count.
_CALL_NAMES = (
    "call checkpoint closed_call core_call custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr jit pjit remat remat2"
)
# One pass at most over what they read. What is not named here runs once.
_CHEAP_NAMES = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh "
    "bitcast_convert_type broadcast_in_dim cbrt ceil clamp complex concatenate "
    "conj convert_element_type copy copy_p cos cosh div eq erf erf_inv erfc "
    "exp exp2 expand_dims expm1 floor ge gt imag integer_pow iota is_finite le "
    "log log1p logistic lt max min mul ne neg nextafter not or pad "
    "population_count pow random_bits random_clone random_fold_in random_seed "
    "random_split random_unwrap random_wrap real reduce_precision rem reshape "
    "rev round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh slice split sqrt square squeeze stack "
    "stop_gradient sub tan tanh threefry2x32 transpose xor"
)
_CALLS = frozenset(_CALL_NAMES.split())
_CHEAP = frozenset(_CHEAP_NAMES.split())


def trace(fn: Callable[..., Any], inputs: Inputs) -> tuple[Program, Any]:
    """Traces fn of one microbatch with the name of the axis in scope.

    Args:
      fn: takes the inputs of one microbatch.
      inputs: of all of them.

    Returns:
      (Program, tree of what fn returns).
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
    program.outputs = _inline(
        program, closed.jaxpr, closed.consts, program.inputs, 0
    )
    return program, jax.tree.structure(shapes)


def _trace_typed(
    make: Callable[..., Any], fn: Callable[..., Any], inputs: Inputs
) -> Any:
    """Traces under shard_map with check_vma=True.

    There a collective wants its axis in the mesh. The mesh with this axis is
    never run on; every equation is evaluated on the real one, without it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = {inputs.axis_name}
    names: Any = (*mesh.axis_names, *axis)
    wider = jax.sharding.AbstractMesh(
        (*mesh.axis_sizes, inputs.size),
        names,
        axis_types=(*mesh.axis_types, jax.sharding.AxisType.Manual),
    )
    examples = inputs.of(0)
    over = [
        varying_axes(example) | (axis if stacked else set())
        for example, stacked in zip(examples, inputs.stacked())
    ]

    def typed(*plain: jax.Array) -> Any:
        return fn(*map(vary_over, plain, over))

    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in examples]
    nothing = jax.sharding.AbstractMesh((), ())
    use = jax.sharding.use_abstract_mesh
    # A mesh may not replace one of another size, but nothing may, and it
    # nothing.
    try:
        with use(nothing), use(wider):
            return make(typed)(*plain)
    except ValueError as error:
        if "context mesh" not in str(error):
            raise
        raise ValueError(
            "Under shard_map with check_vma=True a function in lockstep cannot "
            "read arrays of the function around it: pass them as arguments."
        ) from error


def _inline(
    program: Program,
    jaxpr: jex.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[int],
    floor: int,
) -> list[int]:
    """Appends all equations, of at least level floor; returns the outputs."""
    numbers = dict(zip(jaxpr.invars, inputs))
    for var, array in zip(jaxpr.constvars, consts):
        numbers[var] = program.constant(array, var.aval)

    def read(atom: Any) -> int:
        if isinstance(atom, jex.Literal):
            # Plain: what JAX keeps remembers the mesh it was traced on.
            kind: Any = atom.aval
            plain = np.asarray(atom.val, kind.dtype)
            return program.constant(plain, kind)
        return numbers[atom]

    for eqn in jaxpr.eqns:
        outputs = _equation(program, eqn, [read(a) for a in eqn.invars], floor)
        numbers.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(
    program: Program, eqn: jex.JaxprEqn, inputs: list[int], floor: int
) -> list[int]:
    name, params = eqn.primitive.name, eqn.params
    kinds = [var.aval for var in eqn.outvars]
    if name in _CALLS:
        if params.get("differentiated"):
            # jax.checkpoint: to be recomputed once the cotangent is there,
            # not kept since the first time.
            floor = max([floor, *(program.levels[i] for i in inputs)])
            if params.get("prevent_cse"):
                inputs = _add_barriers(program, inputs, floor)
        return _inline(program, *_body(eqn), inputs, floor)
    if name == "name":  # a label for policies of jax.checkpoint
        return inputs
    if name == "optimization_barrier":
        return _add_barriers(program, inputs, floor)
    if name == "pvary":
        rest = other_axes(program, eqn)
        if not rest:
            return inputs
        run = functools.partial(_vary, rest)
        return program.add(name, run, inputs, kinds, cheap=True, floor=floor)
    if program.axis_name in named_axes(eqn):
        return add_collective(program, eqn, inputs, floor)
    if communicates_inside(program, eqn):
        if name == "cond" and not program.stacked[inputs[0]]:
            return add_branches(program, eqn, inputs, floor, _inline)
        if name == "scan":
            return add_scan(program, eqn, inputs, floor, _inline)
        refuse(program, eqn)
    if name == "conv_general_dilated":
        run = functools.partial(convolve, eqn.primitive, params)
    elif name in REBUILD and types_say_varying():
        # Types inside of it name the axis; see _trace_typed.
        evaluate = functools.partial(_evaluate, program)
        run = functools.partial(REBUILD[name], evaluate, params)
    else:
        params = _on_real_mesh(program, params)
        run = functools.partial(bind, eqn.primitive, params)
    return program.add(
        name,
        run,
        inputs,
        kinds,
        cheap=name in _CHEAP,
        floor=floor,
    )


def _on_real_mesh(program: Program, params: dict[str, Any]) -> dict[str, Any]:
    """Takes the axis of the microbatches out of shardings; see _trace_typed."""
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
    """Appends a barrier for each value, so that what is shared stays shared."""
    return [
        program.add(
            "optimization_barrier",
            _barrier,
            [i],
            [program.kinds[i]],
            cheap=True,
            floor=floor,
        )[0]
        for i in inputs
    ]


def _barrier(x: jax.Array) -> list[jax.Array]:
    return [jax.lax.optimization_barrier(x)]


def _vary(over: tuple[Hashable, ...], x: jax.Array) -> list[jax.Array]:
    return [vary_over(x, over)]


def _body(eqn: jex.JaxprEqn) -> tuple[jex.Jaxpr, Sequence[Any]]:
    core: Any = jex  # types of some versions leave this class out
    for value in eqn.params.values():
        if isinstance(value, core.ClosedJaxpr):
            return value.jaxpr, value.consts
        if isinstance(value, jex.Jaxpr):
            return value, ()
    raise ValueError(f"{eqn.primitive.name} holds no code to run in lockstep.")


def _evaluate(program: Program, closed: Any, *inputs: Any) -> list[Any]:
    """Evaluates code whose types name the axis of the microbatches."""
    inner = Program(program.axis_name, program.size)
    numbers = [inner.value(var.aval, False) for var in closed.jaxpr.invars]
    outputs = _inline(inner, closed.jaxpr, closed.consts, numbers, 0)
    known = {**inner.constants, **dict(zip(numbers, inputs))}
    for node in inner.nodes:
        out = node.run(*(known[i] for i in node.inputs))
        known.update(zip(node.outputs, out))
    return [known[i] for i in outputs]
