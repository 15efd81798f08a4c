"""A traced program in float64, in place of the narrower types it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxbn.accumulate._rebuild import REBUILD

# Their derivatives are taken already; what remains is their bodies.
_CALLS = frozenset(
    [
        "call",
        "checkpoint",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "jit",
        "pjit",
        "remat",
        "remat2",
    ]
)
# The bits of these are those of their own type.
_NARROW = frozenset(["bitcast_convert_type", "custom_call", "ffi_call"])


def in_float64(closed: Any) -> Callable[[Sequence[Any]], list[np.ndarray]]:
    """Returns a closed jaxpr on flat inputs, all floats and complex widened."""
    compiled = jax.jit(lambda inputs: _evaluate(closed, *inputs))

    def run(inputs: Sequence[Any]) -> list[np.ndarray]:
        with jax.enable_x64(True):
            return [np.asarray(a) for a in compiled(list(map(_widen, inputs)))]

    return run


def narrowest(closed: Any) -> Any:
    """Returns the floating dtype with the fewest digits that a program has."""
    found: set[Any] = set()
    pending = [getattr(closed, "jaxpr", closed)]
    while pending:
        jaxpr = pending.pop()
        values = [*jaxpr.invars, *jaxpr.constvars]
        for eqn in jaxpr.eqns:
            values += [*eqn.invars, *eqn.outvars]
            pending += jax.extend.core.jaxprs_in_params(eqn.params)
        found |= {getattr(v.aval, "dtype", None) for v in values}
    floats = [d for d in found if d and jnp.issubdtype(d, jnp.inexact)]
    return max(floats, key=lambda d: jnp.finfo(d).eps, default=jnp.float32)


def _wide(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return dtype


def _widen(x: Any) -> Any:
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return x if _wide(x.dtype) == x.dtype else x.astype(_wide(x.dtype))


def _evaluate(closed: Any, *inputs: Any) -> list[Any]:
    jaxpr = getattr(closed, "jaxpr", closed)
    env = dict(zip(jaxpr.invars, inputs))
    env.update(zip(jaxpr.constvars, map(_widen, getattr(closed, "consts", ()))))

    def read(atom: Any) -> Any:
        if isinstance(atom, jax.extend.core.Literal):
            return _widen(atom.val)
        return env[atom]

    for eqn in jaxpr.eqns:
        outputs = _run(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _run(eqn: Any, inputs: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        body = params.get("jaxpr", params.get("call_jaxpr"))
        return _evaluate(body, *inputs)
    if name in REBUILD:
        return REBUILD[name](_evaluate, params, *inputs)
    if name == "shard_map":
        return _mapped(params, inputs)
    if name == "reduce_precision":
        return inputs
    if name in _NARROW:
        atoms = zip(eqn.invars, inputs)
        inputs = [jnp.asarray(x, atom.aval.dtype) for atom, x in atoms]
    else:
        params = {key: _wide_setting(value) for key, value in params.items()}
    outputs = eqn.primitive.bind(*inputs, **params)
    return [
        _widen(output)
        for output in (outputs if eqn.primitive.multiple_results else [outputs])
    ]


def _wide_setting(value: Any) -> Any:
    if hasattr(getattr(value, "jaxpr", value), "eqns"):
        return _wide_body(value)
    is_dtype = isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )
    return _wide(np.dtype(value)) if is_dtype else value


def _wide_body(closed: Any) -> Any:
    """Such as how a scatter combines two numbers."""
    kinds = [
        jax.ShapeDtypeStruct(aval.shape, _wide(aval.dtype))
        for aval in (v.aval for v in getattr(closed, "jaxpr", closed).invars)
    ]
    wide = jax.make_jaxpr(lambda *inputs: _evaluate(closed, *inputs))(*kinds)
    return wide if hasattr(closed, "jaxpr") else wide.jaxpr


def _mapped(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    # The second name is that of jax 0.11 and before.
    axes: Any = params.get("newly_manual_axes", params.get("manual_axes"))
    outputs: list[Any] = jax.shard_map(
        lambda *inputs: _evaluate(params["jaxpr"], *inputs),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=list(params["out_specs"]),
        axis_names=axes,
        check_vma=params["check_vma"],
    )(*inputs)
    return outputs
