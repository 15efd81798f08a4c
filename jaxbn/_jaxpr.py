"""Reading, evaluating and rebuilding jaxprs, for all that interpret programs.

`jaxbn.fold` reads a model, `jaxbn.accumulate` cuts a step at its collectives,
`jaxbn.testing` evaluates one in float64. "Code" is a jaxpr with its constants
or without; a value is whatever stands for an array where it is interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxbn._compat.jaxprs import (
    Code,
    Equation,
    bodies,
    constants_of,
    is_code,
    is_literal,
    scan_lengths,
    shard_map_options,
    without_constants,
)

# Calls of code, which does what it would do in place of the call.
CALLS = frozenset(["call", "closed_call", "core_call", "jit", "pjit"])
# Their derivative, or what is kept for it, is not that of their body. Once
# derivatives are taken they are calls like the others.
GUARDED_CALLS = frozenset(
    ["checkpoint", "custom_jvp_call", "custom_vjp_call", "remat", "remat2"]
)
# These pass values on, some to other axes or in another dtype.
MOVES = frozenset(
    [
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "expand_dims",
        "name",
        "pvary",
        "reshape",
        "rev",
        "sharding_constraint",
        "squeeze",
        "stop_gradient",
        "transpose",
    ]
)
ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "cbrt",
        "clamp",
        "div",
        "exp",
        "exp2",
        "expm1",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "pow",
        "rsqrt",
        "select_n",
        "sign",
        "sqrt",
        "square",
        "sub",
        "tanh",
    ]
)

# (code, *values) -> values
Evaluate = Callable[..., list[Any]]


def called(eqn: Equation) -> Code | None:
    """Returns the code that a call calls; None for other equations."""
    if eqn.primitive.name not in CALLS | GUARDED_CALLS:
        return None
    first = (eqn.params.get(key) for key in ("jaxpr", "call_jaxpr"))
    return next(filter(is_code, (*first, *eqn.params.values())), None)


def jaxprs(code: Code) -> Iterator[Any]:
    """Returns code, and all that lies inside its equations."""
    outer = without_constants(code)
    yield outer
    for eqn in outer.eqns:
        for inner in bodies(eqn):
            yield from jaxprs(inner)


def equations(code: Code) -> Iterator[Equation]:
    """Returns all equations, those inside of others too."""
    for eqn in without_constants(code).eqns:
        yield eqn
        for inner in bodies(eqn):
            yield from equations(inner)


def interpret(
    code: Code,
    inputs: Sequence[Any],
    equation: Callable[[Equation, list[Any]], Sequence[Any]],
    constant: Callable[[Any, Any], Any],
) -> list[Any]:
    """Evaluates code with values of any kind, equation by equation.

    Args:
      code: what to evaluate.
      inputs: values of its arguments.
      equation: (equation, values that it reads) -> values that it writes.
      constant: (variable or literal, array) -> the value that stands for it.

    Returns:
      Values of the results.
    """
    jaxpr = without_constants(code)
    known = dict(zip(jaxpr.invars, inputs))
    for variable, array in zip(jaxpr.constvars, constants_of(code)):
        known[variable] = constant(variable, array)

    def read(atom: Any) -> Any:
        return constant(atom, atom.val) if is_literal(atom) else known[atom]

    for eqn in jaxpr.eqns:
        outputs = equation(eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def is_platform_dependent(eqn: Equation) -> bool:
    """Whether an equation is that of `jax.lax.platform_dependent`."""
    return eqn.params.get("branches_platforms") is not None


def choose(
    params: dict[str, Any],
    branches: Sequence[Callable[..., Any]],
    index: Any,
    *operands: Any,
) -> Any:
    """Calls the branch that a cond takes, of others than its own.

    What depends on the platform stays so: branches that cannot be compiled
    for a platform are not.

    Args:
      params: of the cond.
      branches: in place of its own, one for each.
      index: of the branch to take; the first input of the cond.
      *operands: the other inputs, in any container.
    """
    platforms = params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(index, branches, *operands)
    default = branches[-1] if platforms[-1] is None else None
    named = {
        platform: branch
        for names, branch in zip(platforms, branches)
        for platform in names or ()
    }
    return jax.lax.platform_dependent(*operands, default=default, **named)


def rebuild(eqn: Equation, evaluate: Evaluate, *inputs: Any) -> list[Any]:
    """Applies an equation of REBUILT with its code evaluated anew.

    Args:
      eqn: the equation.
      evaluate: (code, *arrays) -> arrays, what to do in place of its code.
      *inputs: arrays that it reads.
    """
    return REBUILT[eqn.primitive.name](evaluate, eqn.params, *inputs)


def rebuild_shard_map(
    eqn: Equation, evaluate: Evaluate, *inputs: Any
) -> list[Any]:
    """As `rebuild`, for an equation of `jax.shard_map`."""
    code = functools.partial(evaluate, eqn.params["jaxpr"])
    mapped = jax.shard_map(code, **shard_map_options(eqn.params))
    outputs: list[Any] = mapped(*inputs)
    return outputs


def _scan(
    evaluate: Evaluate, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    first, carried = scan_lengths(params)
    last = first + carried

    def step(carry: Sequence[Any], x: Sequence[Any]) -> Any:
        out = evaluate(params["jaxpr"], *inputs[:first], *carry, *x)
        return out[:carried], out[carried:]

    carry, out = jax.lax.scan(
        step,
        list(inputs[first:last]),
        list(inputs[last:]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *out]


def _while(
    evaluate: Evaluate, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]

    def goes_on(carry: Sequence[Any]) -> Any:
        return evaluate(params["cond_jaxpr"], *inputs[:first], *carry)[0]

    def step(carry: Sequence[Any]) -> list[Any]:
        return evaluate(params["body_jaxpr"], *inputs[first:last], *carry)

    return jax.lax.while_loop(goes_on, step, list(inputs[last:]))


def _cond(
    evaluate: Evaluate, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    branches = [functools.partial(evaluate, b) for b in params["branches"]]
    out: list[Any] = choose(params, branches, *inputs)
    return out


# By the name of the primitive: (evaluate, params, *inputs) -> outputs.
REBUILT = {"scan": _scan, "while": _while, "cond": _cond}
