"""Noise behind batch norm: shift that moves at every step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.why import nets

ARMS = ("without", "without, noisy", "with", "with, noisy")


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


def measure(
    seeds: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    places: np.ndarray,
    *,
    sizes: tuple[int, ...],
    rate: float,
) -> dict[str, Any]:
    """Returns the accuracy on each batch, (seeds, T), for each of ARMS."""
    return {
        arm: np.asarray(
            _train(
                seeds,
                train,
                places,
                rate,
                norm=not arm.startswith("without"),
                noisy="noisy" in arm,
                sizes=sizes,
            )
        )
        for arm in ARMS
    }


@functools.partial(jax.jit, static_argnames=("norm", "noisy", "sizes"))
def _train(
    seeds: jax.Array,
    train: tuple[jax.Array, jax.Array],
    places: jax.Array,
    rate: jax.Array,
    *,
    norm: bool,
    noisy: bool,
    sizes: tuple[int, ...],
) -> jax.Array:
    def one(seed, places):
        start, draws = jax.random.split(jax.random.key(seed))
        params = nets.init(start, sizes, norm=norm, gain="glorot")

        def loss(params, batch, key):
            x, labels = batch
            between = functools.partial(noise, key) if noisy else None
            logits = nets.apply(params, x, norm=norm, between=between).logits
            right = (logits.argmax(-1) == labels).mean()
            return nets.cross_entropy(logits, labels), right

        def step(params, given):
            index, places = given
            batch = jax.tree.map(lambda a: a[places], train)
            gradient, right = jax.grad(loss, has_aux=True)(
                params, batch, jax.random.fold_in(draws, index)
            )
            new = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
            return new, right

        given = (jnp.arange(len(places)), places)
        return jax.lax.scan(step, params, given)[1]

    return jax.vmap(one)(seeds, places)
