"""The loss along its gradient, while a net of eight layers learns."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import diagnostics
from train.why import nets
from train.why.data import Setting

MEASURES = ("loss range", "predictiveness", "effective beta")
MOMENTS = ("first step", "equal step", "equal loss")
EVERY = 2  # steps between two probes
LATE = (50, 150)  # steps of the comparison at equal step
LOSS = 1.0  # nats; the comparison at equal loss starts below it
PROBES = 5  # and takes that many probes

_GRID = 2.0 ** np.arange(-1, 2.5, 0.5)  # half to four learning rates


class Probes(NamedTuple):
    """Along the run of each seed, P probes."""

    loss: jax.Array  # (S, P) on the batch of the step, in nats
    measures: jax.Array  # (S, P, 3), in the order of MEASURES


@functools.partial(jax.jit, static_argnames=("norm", "sizes"))
def probe(
    setting: Setting, rate: jax.Array, *, norm: bool, sizes: tuple[int, ...]
) -> Probes:
    """Trains, and follows every other step's gradient from half to 4 steps."""
    loss = nets.loss_of(norm=norm)

    def interval(params, indices):
        batch = jax.tree.map(lambda a: a[indices[0]], setting.train)
        line = diagnostics.gradient_line(
            loss, params, (), batch, steps=rate * jnp.asarray(_GRID)
        )
        found = (
            line.loss_range,
            line.predictiveness.max(),
            line.effective_beta,
        )
        new, _, _ = nets.sgd(loss, params, setting.train, indices, rate)
        return new, Probes(line.loss0, jnp.stack(found))

    def one(key, indices):
        params = nets.init(key, sizes, norm=norm, gain="glorot")
        indices = indices.reshape(-1, EVERY, indices.shape[-1])
        return jax.lax.scan(interval, params, indices)[1]

    return jax.vmap(one)(setting.keys, setting.indices)


def ratios(without: Probes, with_: Probes) -> dict[str, np.ndarray]:
    """Without over with batch norm: above 1, batch norm is smoother.

    Medians over the probes of each of MOMENTS. At equal step: steps 50 to 150
    of both. At equal loss: five probes of each from where its loss first is
    below 1; NaN where it never is.

    Returns:
      (S, 3) for each of MOMENTS, in the order of MEASURES.
    """
    first, last = (edge // EVERY for edge in LATE)
    windows = {
        "first step": lambda losses: slice(0, 1),
        "equal step": lambda losses: slice(first, last),
        "equal loss": _below,
    }
    found = {}
    for moment in MOMENTS:
        sides = [
            [
                _median(measures[windows[moment](losses)])
                for losses, measures in zip(*probes)
            ]
            for probes in (without, with_)
        ]
        found[moment] = np.divide(*sides)
    return found


def _below(losses: np.ndarray) -> slice:
    below = np.flatnonzero(losses < LOSS)
    start = below[0] if len(below) else len(losses)
    return slice(start, start + PROBES)


def _median(measures: np.ndarray) -> np.ndarray:
    if not len(measures):
        return np.full(len(MEASURES), np.nan)
    return np.median(measures, axis=0)
