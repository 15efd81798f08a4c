"""Optimizers and schedules against their equations in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.fast_runs import small
from train import optimizer, schedules


def test_triangle():
    rate = schedules.triangular_schedule(476, start=0.2, peak=0.23, end=0.07)
    steps = np.array([0, 50, 109, 300, 475, 476])  # int(0.23 * 476) is 109
    down = 1 - (1 - 0.07) * (steps - 109) / (476 - 109)
    want = np.where(steps < 109, 0.2 + 0.8 * steps / 109, down)
    np.testing.assert_allclose([rate(s) for s in steps], want, rtol=1e-5)
    linear = schedules.triangular_schedule(10, start=1.0, peak=0.0, end=0.0)
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
    schedule = schedules.make_schedule(config, steps=steps, steps_per_epoch=4)
    made = optimizer.make_optimizer(config, schedule, bias_steps=bias_steps)
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
    got = stepped(bias_steps=2, learning_rate=0.5, weight_decay=0.25)
    peak = 0.5 * (64 if group == "norm_bias" else 1)
    shares = np.array([0.2, 1.0, 1 - 0.93 / 7, 1 - 2 * 0.93 / 7])
    if group == "whitening_bias":
        shares[2:] = 0
    want = by_hand(LEAVES[group], (peak, shares), 0.85, 0.5 * 0.25)
    for one, other in zip(map(LEAVES[group], got), want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


def test_affine_parameters_without_decay():
    got = stepped(bias_steps=0, weight_decay=0.25, decay_affine=False)
    leaf, rate = LEAVES["norm_bias"], small().learning_rate
    shares = np.array([0.2, 1.0, 1 - 0.93 / 7, 1 - 2 * 0.93 / 7])
    want = by_hand(leaf, (64 * rate, shares), 0.85, 0.0)
    for one, other in zip(map(leaf, got), want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("group", ["norm_bias", "head", "whitening_bias"])
def test_muon_leaves_the_rest_to_sgd(group):
    """The published rates are for the sum of the losses of 2000 examples."""
    got = stepped("muon", bias_steps=3, learning_rate=0.67 * 2000)
    shares = 1 - np.arange(4) / 8
    if group == "whitening_bias":
        shares = np.maximum(1 - np.arange(4) / 3, 0)
    peak = 2000 * (0.67 if group == "head" else 0.053)
    want = by_hand(LEAVES[group], (peak, shares), 0.85, 2e-6 * 2000)
    for one, other in zip(map(LEAVES[group], got), want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-4)


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
    lookahead = optimizer.Lookahead(every=5, decay=0.8, steps=12)
    for number in range(1, 13):
        change = rng.normal(size=3)
        fast = fast + change
        if number % 5 == 0:
            d = 0.8 * (number / 12) ** 3
            fast = slow = d * slow + (1 - d) * fast
        if number == 12:
            fast = slow
        got = lookahead.update(
            got[0] + jnp.float32(change), got[1], jnp.int32(number)
        )
        np.testing.assert_allclose(got[0], fast, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1], slow, rtol=1e-5, atol=1e-6)


def test_muon_is_for_any_network():
    """Kernels of convolutions keep their norm; all others follow SGD."""
    config = small("muon", schedule="cosine")
    schedule = schedules.make_schedule(config, steps=8, steps_per_epoch=4)
    made = optimizer.make_optimizer(config, schedule, bias_steps=0)
    params = {
        "Block_0": {"Conv_0": {"kernel": jnp.ones((3, 3, 4, 5))}},
        "BatchNorm_0": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "Dense_0": {"kernel": jnp.ones((5, 2)), "bias": jnp.zeros(2)},
    }
    labels = optimizer.param_groups(params)
    assert jax.tree.leaves(labels) == [
        *("affine", "affine", "convolution", "affine", "dense")
    ]
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(made.update)(grads, made.init(params), params)
    assert all((np.asarray(u) != 0).any() for u in jax.tree.leaves(updates))
