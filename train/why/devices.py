"""Training on devices with statistics per device, shuffled, or synchronized."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from jaxbn import batch_norm, diagnostics
from train.why import nets
from train.why.data import Examples, Setting
from train.why.experiment import per_seed

DEVICES = 8
EACH = 8  # examples per device
EVERY = 25  # steps between two evaluations
EVAL_BATCHES = 12  # of an evaluation
SHOWN = 4  # devices whose influence on each other is measured
NORMS = {
    "none": None,
    "per device": batch_norm,
    "shuffled": batch_norm,
    "synchronized": functools.partial(batch_norm, axis_name="devices"),
}


class Batches(NamedTuple):
    """The examples of each step."""

    indices: np.ndarray  # (T, devices, n) int32, half even and half odd
    offsets: np.ndarray  # (T, devices, 1) float32, added to the extra channel


class Curves(NamedTuple):
    """Of one method and one seed."""

    params: nets.Params
    statistics: list[jaxbn.RunningStats]
    train: jax.Array  # (T,) accuracy on the batch of the step
    test: jax.Array  # (T / 25,) with population statistics
    per_device: jax.Array  # () test, with batch statistics per device
    shuffled: jax.Array  # () test, the same after shuffling


def draw(examples: Examples, steps: int, *, seed: tuple[int, int]) -> Batches:
    """Draws batches with equally many even and odd labels on every device.

    All examples of a device have one offset, of standard deviation 10.
    """
    rng = np.random.default_rng((*seed, 3))
    size = (steps, DEVICES, EACH // 2)
    even, odd = (np.flatnonzero(examples[1] % 2 == rest) for rest in (0, 1))
    indices = np.concatenate([rng.choice(even, size), rng.choice(odd, size)], 2)
    offsets = rng.normal(0, 10.0, (steps, DEVICES, 1))
    return Batches(indices.astype(np.int32), offsets.astype(np.float32))


def _batch(examples: Examples, drawn: Batches) -> tuple[jax.Array, jax.Array]:
    """Returns x (..., n, D + 1) and labels (..., n), 1 for even."""
    x = examples[0][drawn.indices]
    labels = 1 - examples[1][drawn.indices] % 2
    channel = 2.0 * labels - 1 + drawn.offsets
    return jnp.concatenate([x, channel[..., None]], -1), labels


def _forward(
    method: str,
    params: nets.Params,
    x: jax.Array,
    key: Any,
    statistics: Any = None,
) -> tuple[jax.Array, list[jaxbn.RunningStats]]:
    """Returns logits and statistics for x (devices, n, D)."""
    shuffled = method == "shuffled" and statistics is None

    def device(x: jax.Array) -> Any:
        if shuffled:
            x = jaxbn.shuffle(x, key, axis_name="devices")
        out = nets.apply(params, x, norm=NORMS[method], statistics=statistics)
        logits = out.logits
        if shuffled:
            logits = jaxbn.unshuffle(logits, key, axis_name="devices")
        return logits, [jaxbn.RunningStats(m.mean, m.var) for m in out.moments]

    return jax.vmap(device, axis_name="devices")(x)


@per_seed
def train(setting: Setting, *, method: str) -> Curves:
    """Trains, and evaluates after every 25 steps.

    Args:
      setting: its indices are three Batches: to train on, for population
        statistics, and of test examples.
      method: a key of NORMS.
    """
    drawn, for_population, for_test = setting.indices
    start, shuffles = jax.random.split(setting.key)
    population_x, _ = _batch(setting.train, for_population)
    test_x, test_labels = _batch(setting.test, for_test)

    def loss(params, given):
        step, batch = given
        x, labels = _batch(setting.train, batch)
        key = jax.random.fold_in(shuffles, step)
        logits, _ = _forward(method, params, x, key)
        flat = logits.reshape(-1, 2), labels.reshape(-1)
        return nets.cross_entropy(*flat), nets.accuracy(*flat)

    def over_batches(method, params, x, statistics=None):
        return jax.vmap(
            lambda x: _forward(method, params, x, shuffles, statistics)
        )(x)

    def evaluate(method, params, statistics=None):
        logits, _ = over_batches(method, params, test_x, statistics)
        return (logits.argmax(-1) == test_labels).mean()

    def population(params):
        # From forward passes in training mode, as a run collects them.
        _, parts = over_batches(method, params, population_x)
        parts = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
        return [jaxbn.pool(part) for part in parts]

    def interval(params, given):
        params, _, right = nets.train(loss, params, given, optax.sgd(0.1))
        return params, (right, evaluate(method, params, population(params)))

    sizes = (test_x.shape[-1], 64, 64, 2)
    params = nets.init(start, sizes, norm=NORMS[method])
    numbered = jnp.arange(len(drawn.indices)), drawn
    intervals = nets.intervals(numbered, EVERY)
    params, (right, tested) = jax.lax.scan(interval, params, intervals)
    per_device = shuffled = evaluate(method, params)
    if method == "per device":
        shuffled = evaluate("shuffled", params)
    known = population(params)
    return Curves(
        params, known, right.reshape(-1), tested, per_device, shuffled
    )


def influence(
    method: str, curves: Curves, setting: Setting, *, train: bool = True
) -> np.ndarray:
    """Norms of the derivatives of logits by the examples on SHOWN devices.

    For the first seed of `train`'s curves and its first test batch: (B, B).
    If not train, with population statistics.
    """
    state = jax.tree.map(lambda a: a[0], (curves.params, curves.statistics))
    drawn = Batches(*(a[0, 0, :SHOWN] for a in setting.indices[2]))
    x, _ = _batch(setting.test, drawn)

    def apply(params, statistics, flat, train):
        known = None if train else statistics
        devices = flat.reshape(x.shape)
        logits, _ = _forward(method, params, devices, jax.random.key(0), known)
        return logits.reshape(len(flat), -1)

    flat = x.reshape(-1, x.shape[-1])
    return np.asarray(diagnostics.influence(apply, *state, flat, train=train))
