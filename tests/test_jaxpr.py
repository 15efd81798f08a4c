"""Jaxprs evaluated with another equation, calls opened and loops rebuilt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn._compat.jaxprs import bind
from jaxbn._jaxpr import (
    REBUILT,
    called,
    equations,
    interpret,
    is_platform_dependent,
    rebuild,
    rebuild_shard_map,
)

X = np.linspace(-1, 1, 8, dtype=np.float32)


def plain(sin, x):
    return sin(x) + jnp.asarray(X)


def with_jvp(sin, x):
    fn = jax.custom_jvp(sin)
    fn.defjvp(lambda primals, tangents: (sin(*primals), *tangents))
    return fn(x)


def with_vjp(sin, x):
    fn = jax.custom_vjp(sin)
    fn.defvjp(lambda x: (sin(x), None), lambda _, g: (g,))
    return fn(x)


def scan(sin, x):
    def step(carry, row):
        carry = carry + sin(row)
        return carry, carry * x[0]

    carry, rows = jax.lax.scan(step, jnp.float32(0), x, reverse=True)
    return carry + rows


def while_loop(sin, x):
    start = sin(x)
    return jax.lax.while_loop(
        lambda v: jnp.abs(sin(v)).max() > 0.3,
        lambda v: sin(v) * 0.5 + 0.1 * start,
        x,
    )


def cond(sin, x):
    return jax.lax.cond(x[0] > x[1], jnp.abs, sin, x)


def platform_dependent(sin, x):
    return jax.lax.platform_dependent(
        x, cpu=sin, tpu=jnp.abs, cuda=jnp.abs, default=jnp.exp
    )


def shard_map(sin, x):
    spec = jax.P("data")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    mapped = jax.shard_map(
        lambda x: sin(x) - jax.lax.pmax(x, "data"),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    return mapped(x)


def evaluate(code, *inputs):
    """Evaluates with tanh in place of sin."""

    def equation(eqn, values):
        body, name = called(eqn), eqn.primitive.name
        if body is not None:
            return evaluate(body, *values)
        if name in REBUILT:
            return rebuild(eqn, evaluate, *values)
        if name == "shard_map":
            return rebuild_shard_map(eqn, evaluate, *values)
        if name == "sin":
            return [jax.lax.tanh(*values)]
        return bind(eqn.primitive, eqn.params, *values)

    return interpret(code, inputs, equation, lambda _, array: array)


@pytest.mark.parametrize(
    "fn",
    (
        plain,
        lambda sin, x: jax.jit(sin)(x),
        lambda sin, x: jax.checkpoint(sin)(x),
        with_jvp,
        with_vjp,
        scan,
        while_loop,
        cond,
        platform_dependent,
        shard_map,
    ),
)
def test_another_equation(fn):
    code = jax.make_jaxpr(functools.partial(fn, jax.lax.sin))(X)
    (got,) = jax.jit(functools.partial(evaluate, code))(X)
    np.testing.assert_allclose(got, fn(jax.lax.tanh, X), rtol=1e-6)


def test_platforms_stay():
    """Of which a branch that no CPU could run is one."""
    code = jax.make_jaxpr(functools.partial(platform_dependent, jnp.sin))(X)
    again = jax.make_jaxpr(functools.partial(evaluate, code))(X)
    before, after = (
        [e.params["branches_platforms"] for e in equations(c) if chosen(e)]
        for c in (code, again)
    )
    assert before == after == [(("cpu",), ("tpu", "cuda"), None)]


def chosen(eqn):
    return eqn.primitive.name == "cond" and is_platform_dependent(eqn)
