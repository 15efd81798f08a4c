"""The loss along the gradient, noise after batch norm, a deep linear network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import diagnostics
from train.why import nets
from train.why.data import Setting
from train.why.experiment import per_seed
from train.why.methods import METHODS
from train.why.nets import Norm, Sizes

RATE = 0.1
MEASURES = ("loss range", "predictiveness", "effective beta")
MOMENTS = ("first step", "equal step", "equal loss")
EVERY = 2  # steps between two probes
LATE = (50, 150)  # steps of the comparison at equal step
LOSS = 1.0  # nats; the comparison at equal loss starts below it
PROBES = 5  # of the comparison at equal loss
NOISY_METHODS = {
    name + suffix: method._replace(
        label=method.label + suffix,
        style="--" if suffix else "-",
        options={**method.options, "noisy": bool(suffix)},
    )
    for name, method in METHODS.items()
    for suffix in ("", ", noisy")
}
# Of the linear network.
LAYERS, WIDTH = 25, 10
LINEAR_RATES = (1e-7, 1e-6)
INTERVAL = 30  # steps between two probes of the shift


class Probes(NamedTuple):
    """P probes along the run of each seed."""

    loss: jax.Array  # (S, P) on the batch of the step, in nats
    measures: jax.Array  # (S, P, 3), in the order of MEASURES


@per_seed
def probe(setting: Setting, *, norm: Norm, sizes: Sizes) -> Probes:
    """Trains, and follows the gradient of every other step for 0.5 to 4 steps."""
    loss = nets.loss_on(setting.train, norm=norm)

    def with_stats(params, batch_stats, index):
        return loss(params, index)

    def interval(params, indices):
        line = diagnostics.gradient_line(
            with_stats,
            params,
            (),
            indices[0],
            steps=RATE * jnp.asarray(2.0 ** np.arange(-1, 2.5, 0.5)),
        )
        found = line.loss_range, line.predictiveness.max(), line.effective_beta
        new, _, _ = nets.train(loss, params, indices, optax.sgd(RATE))
        return new, Probes(line.loss0, jnp.stack(found))

    params = nets.init(setting.key, sizes, norm=norm, gain="glorot")
    intervals = nets.intervals(setting.indices, EVERY)
    return jax.lax.scan(interval, params, intervals)[1]


def ratios(without: Probes, with_: Probes) -> dict[str, np.ndarray]:
    """Without over with batch norm: above 1, batch norm is smoother.

    Medians over the probes of each of MOMENTS. At equal step: steps 50 to 150.
    At equal loss: the first five probes of each from where its loss is below 1;
    NaN if it never is.

    Returns:
      (S, 3) for each of MOMENTS, in the order of MEASURES.
    """

    def window(moment: str, losses: np.ndarray) -> slice:
        if moment == "first step":
            return slice(0, 1)
        if moment == "equal step":
            return slice(*(edge // EVERY for edge in LATE))
        below = np.flatnonzero(losses < LOSS)
        start = below[0] if len(below) else len(losses)
        return slice(start, start + PROBES)

    def medians(moment: str, probes: Probes) -> list[np.ndarray]:
        chosen = [rows[window(moment, losses)] for losses, rows in zip(*probes)]
        never = np.full(len(MEASURES), np.nan)
        return [np.median(c, axis=0) if len(c) else never for c in chosen]

    return {
        moment: np.divide(*(medians(moment, p) for p in (without, with_)))
        for moment in MOMENTS
    }


def noise(key: jax.Array, layer: int, h: jax.Array) -> jax.Array:
    """Returns s h + m, with a new random scale and shift per unit and step.

    For each unit mu ~ U(-0.5, 0.5) and sigma ~ U(1, 1.25); for each of its
    values m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1).

    Args:
      key: of the step.
      layer: number, so that layers have different noise.
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


@per_seed
def train(
    setting: Setting, *, norm: Norm, noisy: bool, sizes: Sizes
) -> jax.Array:
    """Returns the accuracy on the batch of each step: (T,)."""
    start, draws = jax.random.split(setting.key)
    params = nets.init(start, sizes, norm=norm, gain="glorot")

    def loss(params, given):
        step, index = given
        key = jax.random.fold_in(draws, step)
        between = functools.partial(noise, key) if noisy else None
        options = {"norm": norm, "between": between}
        return nets.loss_on(setting.train, **options)(params, index)

    given = jnp.arange(len(setting.indices)), setting.indices
    return nets.train(loss, params, given, optax.sgd(RATE))[2]


@per_seed
def linear(
    key: jax.Array, rate: jax.Array, *, norm: Norm, intervals: int
) -> dict[str, jax.Array]:
    """Trains W_1 ... W_25 x to be A x by gradient descent on all examples.

    x and A are normal, A and the initial layers with variance 1 / 10; the loss
    is summed over 1000 examples.

    Returns:
      loss (T,) and cosine (T / 30, 25) between each layer's gradients before
      and after an update of the layers before it.
    """
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (1000, WIDTH))
    target = x @ (jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5)
    affine = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    kernels = jax.random.normal(keys[2], (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    params = [{"kernel": k} | (affine if norm else {}) for k in kernels]

    def layer(h, given):
        h = h @ given["kernel"]
        if norm:
            h, _ = norm(h, given["scale"], given["bias"])
        return h, None

    def loss(params, batch_stats, batch):
        # A scan compiles one layer instead of 25.
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *params)
        h, _ = jax.lax.scan(layer, batch[0], stacked)
        return jnp.square(h - batch[1]).sum(), None

    def interval(params, _):
        last, losses, path = nets.train(
            lambda params, _: loss(params, (), (x, target)),
            params,
            jnp.arange(INTERVAL),
            optax.sgd(rate),
            watch=lambda _, new, __: new,
        )
        shift = diagnostics.internal_covariate_shift(
            loss,
            params,
            jax.tree.map(lambda a: a[0], path),
            (),
            (x, target),
            order=[str(i) for i in range(LAYERS)],
        )
        return last, {"loss": losses, "cosine": shift.cosine}

    _, found = jax.lax.scan(interval, params, length=intervals)
    return found | {"loss": found["loss"].reshape(-1)}
