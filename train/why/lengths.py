"""Nets whose hidden kernels alone are trained, made longer and shorter."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.diagnostics import angular_update
from train.why import data, nets
from train.why.finding import Settings

HIDDEN, BATCH = (64, 64), 64
FACTORS = np.logspace(-2, 2, 17)
DECAY_RATE, DECAY = 0.1, 0.05  # learning rate and weight decay


class Scaled(NamedTuple):
    """At each of FACTORS: (seeds, factors)."""

    loss: np.ndarray
    gradient: np.ndarray  # norm of the first kernel's


def split(params: nets.Params) -> tuple[nets.Params, nets.Params]:
    """Parts parameters into the hidden kernels and the rest."""
    kernels = {
        name: {"kernel": layer["kernel"]}
        for name, layer in params.items()
        if name != "head"
    }
    rest = {
        name: {
            key: value
            for key, value in layer.items()
            if name == "head" or key != "kernel"
        }
        for name, layer in params.items()
    }
    return kernels, rest


def loss_of_kernels(rest: nets.Params, **options: Any) -> nets.Loss:
    """The loss as a function of the hidden kernels alone."""
    whole = nets.loss_of(**options)

    def loss(kernels, batch_stats, batch):
        params = {name: rest[name] | kernels.get(name, {}) for name in rest}
        return whole(params, batch_stats, batch)

    return loss


def _start(found: data.Data, key: jax.Array, norm: bool) -> tuple:
    sizes = (found.train_x.shape[1], *HIDDEN, found.num_classes)
    return split(nets.init(key, sizes, norm=norm, dtype=float))


def _given(settings: Settings, found: data.Data, steps: int) -> tuple:
    """A key and an order of examples a seed, and the data."""
    keys = jnp.stack([jax.random.key(seed) for seed in settings.seeds])
    places = data.places_by_seed(
        len(found.train_y), batch_size=BATCH, steps=steps, seeds=settings.seeds
    )
    x = jnp.asarray(found.train_x, float)
    return keys, places, (x, jnp.asarray(found.train_y))


def scaled(
    settings: Settings, found: data.Data, norm: bool, epsilon: float
) -> Scaled:
    """Scales the first kernel of a new net by each of FACTORS."""

    def one(key, places, examples, factor):
        kernels, rest = _start(found, key, norm)
        loss = loss_of_kernels(rest, norm=norm, epsilon=epsilon)
        kernels["layer0"]["kernel"] *= factor
        batch = jax.tree.map(lambda a: a[places[0]], examples)
        value, gradient = jax.value_and_grad(loss, has_aux=True)(
            kernels, (), batch
        )
        return value[0], jnp.linalg.norm(gradient["layer0"]["kernel"])

    every = jax.vmap(one, (None, None, None, 0))
    every = jax.jit(jax.vmap(every, (0, 0, None, None)))
    given = _given(settings, found, 1)
    return Scaled(*map(np.asarray, every(*given, FACTORS)))


def decayed(
    settings: Settings, found: data.Data, norm: bool, epsilon: float
) -> np.ndarray:
    """Losses with weight decay, and with the rate that replaces it.

    Returns:
      (seeds, 2, steps).
    """
    steps = 100 if settings.quick else 400
    t = np.arange(steps)
    growing = DECAY_RATE * (1 - DECAY_RATE * DECAY) ** (-2.0 * t - 1)
    rates = np.stack([np.full(steps, DECAY_RATE), growing])
    decays = np.array([DECAY, 0.0])

    def one(key, places, examples, rate, decay):
        kernels, rest = _start(found, key, norm)
        loss = loss_of_kernels(rest, norm=norm, epsilon=epsilon)
        return nets.sgd(
            loss, kernels, examples, places, rate, weight_decay=decay
        )[1]

    every = jax.vmap(one, (None, None, None, 0, 0))
    every = jax.jit(jax.vmap(every, (0, 0, None, None, None)))
    return np.asarray(every(*_given(settings, found, steps), rates, decays))


def horizon(rate: float, decay: float) -> int:
    """Steps after which equilibrium has long been reached."""
    return round(8 / (rate * decay))


def angles(
    settings: Settings,
    found: data.Data,
    pairs: tuple,
    norm: bool,
) -> np.ndarray:
    """Angle of each step, in radians, root mean square over channels.

    Returns:
      (pairs, seeds, steps, layers).
    """
    steps = max(horizon(*pair) for pair in pairs)

    def watch(old, new):
        return jnp.stack(
            [
                jnp.sqrt(
                    jnp.square(
                        angular_update(old, new, path=(name, "kernel"))
                    ).mean()
                )
                for name in old
            ]
        )

    def one(key, places, examples, pair):
        kernels, rest = _start(found, key, norm)
        return nets.sgd(
            loss_of_kernels(rest, norm=norm),
            kernels,
            examples,
            places,
            pair[0],
            weight_decay=pair[1],
            watch=watch,
        )[2]

    every = jax.vmap(one, (0, 0, None, None))
    every = jax.jit(jax.vmap(every, (None, None, None, 0)))
    given = _given(settings, found, steps)
    return np.asarray(every(*given, np.array(pairs, np.float32)))
