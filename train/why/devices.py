"""Nets on devices whose statistics are their own, moved about, or common."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import diagnostics
from train.why import nets

WAYS = ("none", "per device", "shuffled", "synchronized")
DEVICES = 8
EACH = 8  # examples on a device
EVERY = 25  # steps between two looks at the test set
LOOK = 12  # batches that a look at training or test set takes
SHOWN = 4  # devices in the picture of who influences whom

_RATE = 0.1
_OFFSET = 10.0  # standard deviation of what the examples of a device share


class Batches(NamedTuple):
    """What devices see at each step."""

    places: np.ndarray  # (T, devices, n) int32, half even and half odd
    offsets: np.ndarray  # (T, devices, 1) float32, added to the extra channel


class Curves(NamedTuple):
    """Of one way and one seed."""

    params: nets.Params
    statistics: list[jaxbn.RunningStats]
    train: jax.Array  # (T,) accuracy on the batch of the step
    test: jax.Array  # (T / 25,) with population statistics
    same: jax.Array  # () test, with the statistics of the same device
    mixed: jax.Array  # () test, with those of companions from all devices


def draw(
    split: tuple[np.ndarray, np.ndarray], steps: int, *, seed: tuple[int, int]
) -> Batches:
    """Draws batches of as many even as odd labels on every device."""
    rng = np.random.default_rng((*seed, 3))
    size = (steps, DEVICES, EACH // 2)
    even, odd = (np.flatnonzero(split[1] % 2 == rest) for rest in (0, 1))
    places = np.concatenate([rng.choice(even, size), rng.choice(odd, size)], 2)
    offsets = rng.normal(0, _OFFSET, (steps, DEVICES, 1))
    return Batches(places.astype(np.int32), offsets.astype(np.float32))


def _batch(
    split: tuple[jax.Array, jax.Array], drawn: Batches
) -> tuple[jax.Array, jax.Array]:
    """Returns x (..., n, D + 1) and labels (..., n), 1 for even."""
    x = split[0][drawn.places]
    labels = 1 - split[1][drawn.places] % 2
    channel = 2.0 * labels - 1 + drawn.offsets
    return jnp.concatenate([x, channel[..., None]], -1), labels


def _forward(
    way: str,
    params: nets.Params,
    x: jax.Array,
    key: jax.Array,
    statistics: Sequence[jaxbn.RunningStats] | None = None,
) -> tuple[jax.Array, Any]:
    """Runs devices: x (devices, n, D) to logits and statistics."""

    def device(x: jax.Array) -> tuple[jax.Array, Any]:
        moved = way == "shuffled" and statistics is None
        if moved:
            x = jaxbn.shuffle(x, key, axis_name="devices")
        out = nets.apply(
            params,
            x,
            norm=way != "none",
            statistics=statistics,
            axis_name="devices" if way == "synchronized" else None,
        )
        logits = out.logits
        if moved:
            logits = jaxbn.unshuffle(logits, key, axis_name="devices")
        return logits, [jaxbn.RunningStats(m.mean, m.var) for m in out.moments]

    return jax.vmap(device, axis_name="devices")(x)


@functools.partial(jax.jit, static_argnames=("way", "looks"))
def train(
    keys: jax.Array,
    train: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array],
    drawn: tuple[Batches, Batches, Batches],
    *,
    way: str,
    looks: int,
) -> Curves:
    """Trains a net for every seed.

    Args:
      keys: (S,) random.
      train, test: all x and all labels.
      drawn: batches to train on, to take population statistics from, and of
        test examples; with a leading axis S.
      way: one of WAYS.
      looks: 25 steps each.

    Returns:
      Curves, with a leading axis S.
    """
    return jax.vmap(
        lambda key, drawn: _one(way, key, train, test, drawn, looks)
    )(keys, drawn)


def _one(
    way: str,
    key: jax.Array,
    train: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array],
    drawn: tuple[Batches, Batches, Batches],
    looks: int,
) -> Curves:
    start, shuffles = jax.random.split(key)
    sizes = (train[0].shape[1] + 1, 64, 64, 2)
    params = nets.init(start, sizes, norm=way != "none")
    look_x, _ = _batch(train, drawn[1])
    test_x, test_labels = _batch(test, drawn[2])

    def loss(params, batch, key):
        x, labels = batch
        logits, _ = _forward(way, params, x, key)
        value = nets.cross_entropy(logits.reshape(-1, 2), labels.reshape(-1))
        return value, (logits.argmax(-1) == labels).mean()

    def step(params, given):
        index, batch = given
        key = jax.random.fold_in(shuffles, index)
        gradient, accuracy = jax.grad(loss, has_aux=True)(
            params, _batch(train, batch), key
        )
        new = jax.tree.map(lambda p, g: p - _RATE * g, params, gradient)
        return new, accuracy

    def evaluate(way, params, statistics=None):
        logits, _ = jax.vmap(
            lambda x: _forward(way, params, x, shuffles, statistics)
        )(test_x)
        return (logits.argmax(-1) == test_labels).mean()

    def population(params):
        # As a run collects them: from its own forward passes in training.
        _, parts = jax.vmap(lambda x: _forward(way, params, x, shuffles))(
            look_x
        )
        parts = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
        return [jaxbn.pool(part) for part in parts]

    def look(carry, given):
        params, accuracy = jax.lax.scan(step, carry[0], given)
        known = population(params)
        return (params, known), (accuracy, evaluate(way, params, known))

    given = (jnp.arange(looks * EVERY), drawn[0])
    given = jax.tree.map(lambda a: a.reshape(looks, EVERY, *a.shape[1:]), given)
    start = params, _untrained(params)
    (params, known), (accuracy, tested) = jax.lax.scan(look, start, given)
    same = mixed = evaluate(way, params)
    if way == "per device":
        mixed = evaluate("shuffled", params)
    return Curves(params, known, accuracy.reshape(-1), tested, same, mixed)


def _untrained(params: nets.Params) -> list[jaxbn.RunningStats]:
    scales = [layer["scale"] for layer in params.values() if "scale" in layer]
    return [jaxbn.init_running(scale.shape) for scale in scales]


def influence(
    way: str,
    curves: Curves,
    test: tuple[jax.Array, jax.Array],
    drawn: Batches,
    *,
    train: bool = True,
) -> np.ndarray:
    """How far logits of one example move with the pixels of another.

    Args:
      way: one of WAYS.
      curves: of `train`.
      test: all x and all labels.
      drawn: batches of test examples, with a leading axis S.
      train: with the statistics of the batch, not those of the population.

    Returns:
      (B, B), of the first seed and batch, on four devices.
    """
    params, statistics = jax.tree.map(
        lambda a: a[0], (curves.params, curves.statistics)
    )
    first = Batches(*(a[0, 0, :SHOWN] for a in drawn))
    x, _ = _batch(test, first)

    def apply(params, statistics, flat, train):
        logits, _ = _forward(
            way,
            params,
            flat.reshape(x.shape),
            jax.random.key(0),
            None if train else statistics,
        )
        return logits.reshape(len(flat), -1)

    flat = x.reshape(-1, x.shape[-1])
    return np.asarray(
        diagnostics.influence(apply, params, statistics, flat, train=train)
    )
