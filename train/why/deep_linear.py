"""Internal covariate shift in a linear net of 25 layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import batch_norm, diagnostics
from train.why.arms import ARMS, each

LAYERS = 25
WIDTH = 10
RATES = (1e-7, 1e-6)
SHOWN = 16  # the layer that figures are given for, counted from 0

_EXAMPLES = 1000
_EVERY = 30  # steps between two probes of the shift


def measure(keys: jax.Array, *, quick: bool) -> dict[str, Any]:
    """Trains W_1 ... W_25 x towards A x by gradient descent on all examples.

    x and A are normal, A with variance 1 / 10 as the layers at the start;
    the loss is summed over examples.

    Returns:
      For "without" and "with" batch norm behind every layer: loss
      (rates, seeds, T) and cosine (rates, seeds, T / 30, 25) of each layer's
      gradient with that after the step of the layers before it.
    """
    steps = 90 if quick else 300
    found = each(
        ARMS, _train, keys, jnp.asarray(RATES), intervals=steps // _EVERY
    )
    return {"rates": RATES, "steps": steps, "every": _EVERY, **found}


def _name(layer: int) -> str:
    return f"layer{layer:02}"


def _loss(norm: bool, params: Any, batch_stats: Any, batch: Any):
    x, target = batch

    def layer(h, given):
        h = h @ given["kernel"]
        if norm:
            h, _ = batch_norm(h, given["scale"], given["bias"])
        return h, None

    # A scan compiles one layer in place of 25.
    stacked = jax.tree.map(
        lambda *a: jnp.stack(a), *(params[_name(i)] for i in range(LAYERS))
    )
    h, _ = jax.lax.scan(layer, x, stacked)
    return jnp.square(h - target).sum(), batch_stats


def _init(key: jax.Array, norm: bool) -> Any:
    params = {}
    kernels = jax.random.normal(key, (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    for i, kernel in enumerate(kernels):
        params[_name(i)] = {"kernel": kernel}
        if norm:
            params[_name(i)]["scale"] = jnp.ones(WIDTH)
            params[_name(i)]["bias"] = jnp.zeros(WIDTH)
    return params


@functools.partial(jax.jit, static_argnames=("norm", "intervals"))
def _train(
    keys: jax.Array, rates: jax.Array, *, norm: bool, intervals: int
) -> dict[str, jax.Array]:
    loss = functools.partial(_loss, norm)
    order = tuple(map(_name, range(LAYERS)))

    def one(rate, key):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (_EXAMPLES, WIDTH))
        a = jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5
        batch = (x, x @ a)

        def step(params, _):
            (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(
                params, (), batch
            )
            new = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
            return new, (value, new)

        def interval(params, _):
            last, (values, path) = jax.lax.scan(
                step, params, None, length=_EVERY
            )
            after = jax.tree.map(lambda a: a[0], path)
            shift = diagnostics.internal_covariate_shift(
                loss, params, after, (), batch, order=order
            )
            return last, (values, shift.cosine)

        params = _init(keys[2], norm)
        _, (values, cosine) = jax.lax.scan(
            interval, params, None, length=intervals
        )
        return {"loss": values.reshape(-1), "cosine": cosine}

    over_seeds = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_seeds, in_axes=(0, None))(rates, keys)
