"""Nets with noise behind batch norm: covariate shift at every step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from train.why import nets
from train.why.arms import WITH, WITHOUT
from train.why.data import Setting

_PLAIN, _NOISY = {"noisy": False}, {"noisy": True}
ARMS = {
    "without": WITHOUT._replace(options=WITHOUT.options | _PLAIN),
    "without, noisy": WITHOUT._replace(
        label="without, noisy", style="--", options=WITHOUT.options | _NOISY
    ),
    "with": WITH._replace(options=WITH.options | _PLAIN),
    "with, noisy": WITH._replace(
        label="with batch norm, noisy",
        style="--",
        options=WITH.options | _NOISY,
    ),
}


def noise(key: jax.Array, layer: int, h: jax.Array) -> jax.Array:
    """Returns s h + m: a shift and a stretch, new for each unit and step.

    For each unit mu ~ U(-0.5, 0.5) and sigma ~ U(1, 1.25); for each of its
    values m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1).

    Args:
      key: of the step.
      layer: number, so that each has noise of its own.
      h: (B, C).

    Source: Santurkar et al. (2018), How Does Batch Normalization Help
    Optimization?, algorithm 1.
    """
    keys = jax.random.split(jax.random.fold_in(key, layer), 4)
    units = h.shape[-1:]
    mu = jax.random.uniform(keys[0], units, h.dtype, -0.5, 0.5)
    sigma = jax.random.uniform(keys[1], units, h.dtype, 1, 1.25)
    m = mu + jax.random.uniform(keys[2], h.shape, h.dtype, -0.1, 0.1)
    s = sigma + 0.1 * jax.random.normal(keys[3], h.shape, h.dtype)
    return s * h + m


@functools.partial(jax.jit, static_argnames=("norm", "noisy", "sizes"))
def train(
    setting: Setting,
    rate: jax.Array,
    *,
    norm: bool,
    noisy: bool,
    sizes: tuple[int, ...],
) -> jax.Array:
    """Returns the accuracy on the batch of each step: (S, T)."""

    def one(key, indices):
        start, draws = jax.random.split(key)
        params = nets.init(start, sizes, norm=norm, gain="glorot")

        def loss(params: nets.Params, given: Any) -> tuple[jax.Array, Any]:
            step, index = given
            x, labels = jax.tree.map(lambda a: a[index], setting.train)
            key = jax.random.fold_in(draws, step)
            between = functools.partial(noise, key) if noisy else None
            logits = nets.apply(params, x, norm=norm, between=between).logits
            right = (logits.argmax(-1) == labels).mean()
            return nets.cross_entropy(logits, labels), right

        given = jnp.arange(len(indices)), indices
        return nets.descend(loss, params, given, rate)[2]

    return jax.vmap(one)(setting.keys, setting.indices)
