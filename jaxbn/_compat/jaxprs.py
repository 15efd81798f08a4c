"""Jaxprs: their classes, the parameters of equations, and evaluation.

JAX documents how to read a jaxpr and promises none of it: all names of
`jax.extend.core` may change without notice.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

Equation = jex.JaxprEqn
Primitive = jex.Primitive
# A jaxpr, with its constants or without. By jax 0.11.2 ClosedJaxpr and Jaxpr
# are one class.
Code = Any


def is_code(value: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr."""
    closed = getattr(jex, "ClosedJaxpr", jex.Jaxpr)
    return isinstance(value, (jex.Jaxpr, closed))


def without_constants(code: Code) -> Any:
    """Returns what has invars, constvars, eqns and outvars."""
    return getattr(code, "jaxpr", code)


def constants_of(code: Code) -> Sequence[Any]:
    """Returns the values of constvars; () of a jaxpr that has none."""
    return getattr(code, "consts", ())


def in_the_form_of(code: Code, like: Code) -> Code:
    """Returns code with its constants only where another one has a place.

    In jax 0.10 an equation takes either the one or the other; see Code.
    """
    return code if hasattr(like, "jaxpr") else without_constants(code)


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a number, in `atom.val`."""
    return isinstance(atom, jex.Literal)


def bodies(eqn: Equation) -> list[Any]:
    """Returns the code that an equation holds, without constants."""
    return list(jex.jaxprs_in_params(eqn.params))


def function_name(code: Code, default: str) -> str:
    """Returns the name of the Python function that code was traced from.

    JAX has no public API for this. Without debug information, the default.
    """
    info = getattr(without_constants(code), "debug_info", None)
    name: str = getattr(info, "func_name", default)
    return name


def scopes(eqn: Equation) -> tuple[str, ...]:
    """Returns the names of `jax.named_scope` around an equation.

    flax sets one for each module, and transformations wrap them. HLO has them
    in public; of an equation they can be read off `source_info` alone.
    """
    found = str(eqn.source_info.name_stack).split("/")
    names = (re.sub(r"^(\w+\()+|\)+$", "", name) for name in found)
    return tuple(name for name in names if name)


def named_axes(eqn: Equation) -> tuple[Hashable, ...]:
    """Returns the named axes that an equation mentions.

    psum and its kind call them axes, the others axis_name; some of those have
    a name in place of a tuple.
    """
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return axes if isinstance(axes, tuple) else (axes,)


def scan_lengths(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan stay in every step, and how many are carried.

    By jax 0.11.2 a tree, ft_in, has replaced num_consts and num_carry.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def shard_map_options(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that `jax.shard_map` was called with.

    jax 0.10.2 renamed manual_axes to newly_manual_axes.
    """
    axes = params.get("newly_manual_axes", params.get("manual_axes"))
    return {
        "mesh": params["mesh"],
        "in_specs": tuple(params["in_specs"]),
        "out_specs": list(params["out_specs"]),
        "axis_names": axes,
        "check_vma": params["check_vma"],
    }


def bind(
    primitive: Primitive, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    """Applies a primitive to arrays, with the parameters of an equation.

    `jax.core.eval_jaxpr` is public, and does so for parameters that nobody has
    changed. From 0.10.1 on get_bind_params returns all parameters in one dict.
    """
    out = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


def evaluate_equation(eqn: Equation, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation in the context that it was traced in.

    `jax.core.eval_jaxpr` only accepts a whole jaxpr, so one is built around the
    equation. JAX reads four fields of its debug information, by position.
    """
    atoms = zip(eqn.invars, inputs)
    given: dict[Any, Any] = {a: v for a, v in atoms if not is_literal(a)}
    info = jex.DebugInfo("jaxbn", eqn.primitive.name, None, None)
    alone = jex.Jaxpr(
        constvars=[],
        invars=list(given),
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=info,
    )
    return jax.core.eval_jaxpr(alone, [], *given.values())


def trace_state() -> Any:
    """Returns what equals itself until another trace begins, as in a scan.

    JAX has no public API for this. jax 0.11 left it to jax.extend alone, which
    calls the kind of comparison a convention; flax's tells a scan or checkpoint
    apart.
    """
    return jex.get_opaque_trace_state(convention="flax")
