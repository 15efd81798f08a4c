"""Nets on devices that normalize alone, shuffled, together, or not at all."""

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

DEVICES = 8
EACH = 8  # examples on a device
EVERY = 25  # steps between two evaluations at the test set
EVAL_BATCHES = 12  # batches that an evaluation takes
SHOWN = 4  # devices in the picture of who influences whom

_RATE = 0.1
_OFFSET = 10.0  # standard deviation of what the examples of a device share

Split = tuple[jax.Array, jax.Array]  # all x and all labels


class Batches(NamedTuple):
    """What devices see at each step."""

    indices: np.ndarray  # (T, devices, n) int32, half even and half odd
    offsets: np.ndarray  # (T, devices, 1) float32, added to the extra channel


class Curves(NamedTuple):
    """Of one arm and one seed."""

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
    indices = np.concatenate([rng.choice(even, size), rng.choice(odd, size)], 2)
    offsets = rng.normal(0, _OFFSET, (steps, DEVICES, 1))
    return Batches(indices.astype(np.int32), offsets.astype(np.float32))


def _batch(split: Split, drawn: Batches) -> tuple[jax.Array, jax.Array]:
    """Returns x (..., n, D + 1) and labels (..., n), 1 for even."""
    x = split[0][drawn.indices]
    labels = 1 - split[1][drawn.indices] % 2
    channel = 2.0 * labels - 1 + drawn.offsets
    return jnp.concatenate([x, channel[..., None]], -1), labels


def _forward(
    arm: str,
    params: nets.Params,
    x: jax.Array,
    key: jax.Array,
    statistics: Sequence[jaxbn.RunningStats] | None = None,
) -> tuple[jax.Array, Any]:
    """Runs devices: x (devices, n, D) to logits and statistics."""
    shuffled = arm == "shuffled" and statistics is None
    options = {
        "norm": arm != "none",
        "statistics": statistics,
        "axis_name": "devices" if arm == "synchronized" else None,
    }

    def device(x: jax.Array) -> tuple[jax.Array, Any]:
        if shuffled:
            x = jaxbn.shuffle(x, key, axis_name="devices")
        out = nets.apply(params, x, **options)
        logits = out.logits
        if shuffled:
            logits = jaxbn.unshuffle(logits, key, axis_name="devices")
        return logits, [jaxbn.RunningStats(m.mean, m.var) for m in out.moments]

    return jax.vmap(device, axis_name="devices")(x)


@functools.partial(jax.jit, static_argnames=("arm", "evaluations"))
def train(
    keys: jax.Array,
    train: Split,
    test: Split,
    drawn: tuple[Batches, Batches, Batches],
    *,
    arm: str,
    evaluations: int,
) -> Curves:
    """Trains a net for every seed, 25 steps before each evaluation.

    Args:
      drawn: batches to train on, to take population statistics from, and of
        test examples; with a leading axis S.
      arm: "none", "per device", "shuffled" or "synchronized".

    Returns:
      Curves, with a leading axis S.
    """
    sizes = (train[0].shape[1] + 1, 64, 64, 2)

    def one(key, drawn):
        start, shuffles = jax.random.split(key)
        params = nets.init(start, sizes, norm=arm != "none")
        population_x, _ = _batch(train, drawn[1])
        test_x, test_labels = _batch(test, drawn[2])

        def loss(params, given):
            index, batch = given
            x, labels = _batch(train, batch)
            key = jax.random.fold_in(shuffles, index)
            logits, _ = _forward(arm, params, x, key)
            flat = logits.reshape(-1, 2), labels.reshape(-1)
            right = (logits.argmax(-1) == labels).mean()
            return nets.cross_entropy(*flat), right

        def evaluate(arm, params, statistics=None):
            logits, _ = jax.vmap(
                lambda x: _forward(arm, params, x, shuffles, statistics)
            )(test_x)
            return (logits.argmax(-1) == test_labels).mean()

        def population(params):
            # As a run collects them: from its own forward passes in training.
            _, parts = jax.vmap(lambda x: _forward(arm, params, x, shuffles))(
                population_x
            )
            parts = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), parts)
            return [jaxbn.pool(part) for part in parts]

        def interval(carry, given):
            params, _, right = nets.descend(loss, carry[0], given, _RATE)
            known = population(params)
            return (params, known), (right, evaluate(arm, params, known))

        given = jax.tree.map(
            lambda a: a.reshape(evaluations, EVERY, *a.shape[1:]),
            (jnp.arange(evaluations * EVERY), drawn[0]),
        )
        start = (
            params,
            [
                jaxbn.init_running(layer["scale"].shape)
                for layer in params.values()
                if "scale" in layer
            ],
        )
        (params, known), (right, tested) = jax.lax.scan(interval, start, given)
        same = mixed = evaluate(arm, params)
        if arm == "per device":
            mixed = evaluate("shuffled", params)
        return Curves(params, known, right.reshape(-1), tested, same, mixed)

    return jax.vmap(one)(keys, drawn)


def influence(
    arm: str, curves: Curves, test: Split, drawn: Batches, *, train: bool = True
) -> np.ndarray:
    """How far logits of one example move with the pixels of another.

    Of `train`'s curves; with train False, with population statistics.

    Returns:
      (B, B), of the first seed and batch, on four devices.
    """
    state = jax.tree.map(lambda a: a[0], (curves.params, curves.statistics))
    x, _ = _batch(test, Batches(*(a[0, 0, :SHOWN] for a in drawn)))

    def apply(params, statistics, flat, train):
        known = None if train else statistics
        devices = flat.reshape(x.shape)
        logits, _ = _forward(arm, params, devices, jax.random.key(0), known)
        return logits.reshape(len(flat), -1)

    flat = x.reshape(-1, x.shape[-1])
    return np.asarray(diagnostics.influence(apply, *state, flat, train=train))
