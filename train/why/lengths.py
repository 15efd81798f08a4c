"""Nets whose hidden kernels alone are trained, made longer and shorter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.diagnostics import angular_update
from train.why import nets
from train.why.data import Data, Settings

HIDDEN, BATCH = (64, 64), 64
FACTORS = np.logspace(-2, 2, 17)  # on the first kernel
DECAY_RATE, DECAY = 0.1, 0.05  # learning rate and weight decay


def _start(
    key: jax.Array, sizes: tuple[int, ...], norm: bool, **options: Any
) -> tuple[nets.Params, nets.Loss]:
    """Returns the hidden kernels, and the loss as a function of them alone."""
    rest = nets.init(key, sizes, norm=norm, dtype=float)
    hidden = [name for name in rest if name != "head"]
    kernels = {name: {"kernel": rest[name].pop("kernel")} for name in hidden}
    whole = nets.loss_of(norm=norm, **options)

    def loss(kernels, batch_stats, batch):
        params = {name: rest[name] | kernels.get(name, {}) for name in rest}
        return whole(params, batch_stats, batch)

    return kernels, loss


def _given(settings: Settings, data: Data, steps: int) -> tuple:
    """A key and an order of examples a seed, and the data."""
    given = data.setting(settings.seeds, batch_size=BATCH, steps=steps)
    x = jnp.asarray(data.train_x, float)
    return given.keys, given.indices, (x, jnp.asarray(data.train_y))


def scaled(
    settings: Settings, data: Data, norm: bool, epsilon: float
) -> dict[str, jax.Array]:
    """Scales the first kernel of a new net by each of FACTORS.

    Returns:
      loss and gradient, the norm of the first kernel's: (seeds, factors).
    """

    def one(key, indices, examples, factor):
        sizes = data.sizes(*HIDDEN)
        kernels, loss = _start(key, sizes, norm, epsilon=epsilon)
        kernels["layer0"]["kernel"] *= factor
        batch = jax.tree.map(lambda a: a[indices[0]], examples)
        value, gradient = jax.value_and_grad(loss, has_aux=True)(
            kernels, (), batch
        )
        norm_ = jnp.linalg.norm(gradient["layer0"]["kernel"])
        return {"loss": value[0], "gradient": norm_}

    every = jax.vmap(one, (None, None, None, 0))
    every = jax.jit(jax.vmap(every, (0, 0, None, None)))
    return every(*_given(settings, data, 1), FACTORS)


def decayed(
    settings: Settings, data: Data, norm: bool, epsilon: float
) -> jax.Array:
    """Losses with weight decay, and with the rate that replaces it.

    Returns:
      (seeds, 2, steps).
    """
    steps = 100 if settings.quick else 400
    t = np.arange(steps)
    growing = DECAY_RATE * (1 - DECAY_RATE * DECAY) ** (-2.0 * t - 1)
    rates = np.stack([np.full(steps, DECAY_RATE), growing])

    def one(key, indices, examples, rate, decay):
        sizes = data.sizes(*HIDDEN)
        kernels, loss = _start(key, sizes, norm, epsilon=epsilon)
        given = loss, kernels, examples, indices, rate
        return nets.sgd(*given, weight_decay=decay)[1]

    every = jax.vmap(one, (None, None, None, 0, 0))
    every = jax.jit(jax.vmap(every, (0, 0, None, None, None)))
    given = _given(settings, data, steps)
    return every(*given, rates, np.array([DECAY, 0.0]))


def horizon(rate: float, decay: float) -> int:
    """Steps after which equilibrium has long been reached."""
    return round(8 / (rate * decay))


def angles(
    settings: Settings, data: Data, pairs: tuple, *, norm: bool
) -> np.ndarray:
    """Angle of each step, in radians, root mean square over channels.

    Returns:
      (pairs, seeds, steps, layers).
    """
    steps = max(horizon(*pair) for pair in pairs)

    def rms(old, new, name):
        turned = angular_update(old, new, path=(name, "kernel"))
        return jnp.sqrt(jnp.square(turned).mean())

    def watch(old, new):
        return jnp.stack([rms(old, new, name) for name in old])

    def one(key, indices, examples, pair):
        kernels, loss = _start(key, data.sizes(*HIDDEN), norm)
        given = loss, kernels, examples, indices, pair[0]
        return nets.sgd(*given, weight_decay=pair[1], watch=watch)[2]

    every = jax.vmap(one, (0, 0, None, None))
    every = jax.jit(jax.vmap(every, (None, None, None, 0)))
    given = _given(settings, data, steps)
    return np.asarray(every(*given, np.array(pairs, np.float32)))
