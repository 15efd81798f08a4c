"""The optimizers of the fast runs against their equations in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.fast_runs import small
from train.fast import optimizer


def test_triangle():
    rate = optimizer.triangular_schedule(476, start=0.2, peak=0.23, end=0.07)
    steps = np.array([0, 50, 109, 300, 475, 476])  # int(0.23 * 476) is 109
    down = 1 - (1 - 0.07) * (steps - 109) / (476 - 109)
    want = np.where(steps < 109, 0.2 + 0.8 * steps / 109, down)
    np.testing.assert_allclose([rate(s) for s in steps], want, rtol=1e-5)
    linear = optimizer.triangular_schedule(10, start=1.0, peak=0.0, end=0.0)
    got = [float(linear(s)) for s in (0, 5, 10)]
    np.testing.assert_allclose(got, [1, 0.5, 0], atol=1e-6)


PARAMS = {
    "Block_0": {"BatchNorm_0": {"bias": 3}, "Conv_0": {"kernel": (3, 3, 4, 5)}},
    "head": {"kernel": (5, 2)},
    "whitening": {"bias": 4},
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.float32(rng.normal(size=shape)),
        PARAMS,
        is_leaf=lambda node: not isinstance(node, dict),
    )


@functools.cache
def stepped(argument="", *, bias_steps, **changes):
    """Returns parameters before and after each of four steps, as float64."""
    config, steps = small(argument, **changes), 8
    made = optimizer.make_optimizer(config, steps=steps, bias_steps=bias_steps)
    params = arrays(0)
    state, kept = made.init(params), [params]
    update = jax.jit(made.update)
    for number in range(4):
        updates, state = update(arrays(1 + number), state, params)
        params = optax.apply_updates(params, updates)
        kept.append(params)
    return [jax.tree.map(np.float64, params) for params in kept]


def by_hand(leaf, rates, momentum, decay):
    """Nesterov's SGD with a decay that does not depend on the rate's peak.

    Args:
      leaf: of a tree, which it takes.
      rates: (peak, share of it at each step).
      decay: of the weight in a step at the full rate, before momentum.
    """
    peak, shares = rates
    weight = np.float64(leaf(arrays(0)))
    velocity, kept = np.zeros_like(weight), [weight]
    for number, share in enumerate(shares):
        gradient = np.float64(leaf(arrays(1 + number)))
        gradient = gradient + decay / peak * weight
        velocity = momentum * velocity + gradient
        move = gradient + momentum * velocity
        weight = weight - peak * share * move
        kept.append(weight)
    return kept


LEAVES = {
    "kernel": lambda tree: tree["Block_0"]["Conv_0"]["kernel"],
    "norm_bias": lambda tree: tree["Block_0"]["BatchNorm_0"]["bias"],
    "head": lambda tree: tree["head"]["kernel"],
    "whitening_bias": lambda tree: tree["whitening"]["bias"],
}


@pytest.mark.parametrize("group", LEAVES)
def test_sgd_by_hand(group):
    got = stepped(
        bias_steps=2, batch_size=512, learning_rate=3000.0, weight_decay=900.0
    )
    unit = 1024 * (1 + 1 / 0.15)
    peak = 3000 / unit * (64 if group == "norm_bias" else 1)
    shares = np.array([0.2, 1.0, 1 - 0.93 / 7, 1 - 2 * 0.93 / 7])
    if group == "whitening_bias":
        shares[2:] = 0
    decay = 900 * 512 / unit
    want = by_hand(LEAVES[group], (peak, shares), 0.85, decay)
    for one, other in zip(map(LEAVES[group], got), want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("group", ["norm_bias", "head", "whitening_bias"])
def test_muon_leaves_the_rest_to_sgd(group):
    got = stepped("muon", bias_steps=3, batch_size=2000)
    shares = 1 - np.arange(4) / 8
    if group == "whitening_bias":
        shares = np.maximum(1 - np.arange(4) / 3, 0)
    peak = 0.67 if group == "head" else 0.053
    want = by_hand(LEAVES[group], (peak, shares), 0.85, 2e-6 * 2000)
    for one, other in zip(map(LEAVES[group], got), want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


def test_muon_step_by_hand():
    first, second = stepped("muon", bias_steps=3)[:2]
    weights, got = map(LEAVES["kernel"], (first, second))
    gradient = np.float64(LEAVES["kernel"](arrays(1))).reshape(-1, 5).T
    x = gradient / np.linalg.norm(gradient)
    for _ in range(3):
        squares = x @ x.T
        x = 3.4445 * x + (-4.775 * squares + 2.0315 * squares @ squares) @ x
    start = weights * math.sqrt(5) / np.linalg.norm(weights)
    want = start - 0.24 * x.T.reshape(weights.shape)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_lookahead_against_numpy():
    rng = np.random.default_rng(0)
    fast = slow = np.zeros(3)
    got = (jnp.zeros(3), jnp.zeros(3))
    move = functools.partial(optimizer.lookahead, steps=12, every=5, decay=0.8)
    for number in range(1, 13):
        change = rng.normal(size=3)
        fast = fast + change
        if number % 5 == 0:
            d = 0.8 * (number / 12) ** 3
            fast = slow = d * slow + (1 - d) * fast
        if number == 12:
            fast = slow
        got = move(got[0] + jnp.float32(change), got[1], jnp.int32(number))
        np.testing.assert_allclose(got[0], fast, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1], slow, rtol=1e-5, atol=1e-6)
    untouched = optimizer.lookahead(1, 2, 10, steps=12, every=0, decay=0.8)
    assert untouched == (1, 2)
