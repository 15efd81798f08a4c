"""A traced program in float64, in place of the narrower types it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._compat import dtype_of
from jaxbn._compat.jaxprs import (
    bind,
    in_the_form_of,
    is_code,
    without_constants,
)
from jaxbn._jaxpr import (
    REBUILT,
    called,
    interpret,
    jaxprs,
    rebuild,
    rebuild_shard_map,
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
    for jaxpr in jaxprs(closed):
        values = [*jaxpr.invars, *jaxpr.constvars]
        for eqn in jaxpr.eqns:
            values += [*eqn.invars, *eqn.outvars]
        found |= {dtype_of(v.aval) for v in values}
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


def _evaluate(code: Any, *inputs: Any) -> list[Any]:
    return interpret(code, inputs, _run, lambda _, array: _widen(array))


def _run(eqn: Any, inputs: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    body = called(eqn)
    if body is not None:
        # Derivatives are taken already.
        return _evaluate(body, *inputs)
    if name in REBUILT:
        return rebuild(eqn, _evaluate, *inputs)
    if name == "shard_map":
        return rebuild_shard_map(eqn, _evaluate, *inputs)
    if name == "reduce_precision":
        return inputs
    if name in _NARROW:
        atoms = zip(eqn.invars, inputs)
        inputs = [jnp.asarray(x, atom.aval.dtype) for atom, x in atoms]
    else:
        params = {key: _wide_setting(value) for key, value in params.items()}
    return [_widen(output) for output in bind(eqn.primitive, params, *inputs)]


def _wide_setting(value: Any) -> Any:
    if is_code(value):
        return _wide_body(value)
    is_dtype = isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )
    return _wide(np.dtype(value)) if is_dtype else value


def _wide_body(code: Any) -> Any:
    """Such as how a scatter combines two numbers."""
    kinds = [
        jax.ShapeDtypeStruct(v.aval.shape, _wide(v.aval.dtype))
        for v in without_constants(code).invars
    ]
    wide = jax.make_jaxpr(lambda *inputs: _evaluate(code, *inputs))(*kinds)
    return in_the_form_of(wide, code)
