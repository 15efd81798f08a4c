"""The fast runs: every trick against numpy, and all of them together."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from configs import cifar10_94, cifar10_96, digits
from jaxbn.linen import BatchNorm
from tests.helpers.command_line import run as run_command
from train import UserError, data
from train.fast import augment, optimizer, programs, step
from train.fast.network import identity_kernel
from train.fast.recipe import SMALLEST, Prepared, make_recipe, prepare
from train.fast.run import run, table, train
from train.fast.whitening import whitening_kernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLASSES = 10
STEPS = 9  # one epoch of six, and half of one
TEST = 37  # no multiple of its batch


def examples(count, seed):
    """Images of 16x16 whose class shows in their colours."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    colour = np.random.default_rng(99).uniform(60, 200, (CLASSES, 1, 1, 3))
    noise = rng.normal(0, 30, (count, SMALLEST, SMALLEST, 3))
    images = np.clip(colour[labels] + noise, 0, 255).astype(np.uint8)
    return data.Split(images, labels)


DATASET = data.Dataset(examples(100, 0), examples(TEST, 1), CLASSES)


def small(argument="", **changes):
    config = cifar10_94.get_config(argument)
    config.widths = (8, 12)  # less to compile
    config.dtype = "float32"
    config.batch_size, config.test_batch_size = 16, 10
    config.epochs = 1.5
    config.whitening_bias_epochs = 1
    config.lookahead_every = 3
    config.seeds = 1
    config.update(changes)
    return config


def norm_of(**fields):
    fields = {"momentum": 0.6, "epsilon": 1e-12, **fields}
    return functools.partial(BatchNorm, use_scale=False, **fields)


def recipe_of(config):
    axis_name = "data" if config.devices > 1 else None
    return make_recipe(config, DATASET, norm_of(axis_name=axis_name))


def mesh_of(devices):
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def compiled(recipe, *, scan):
    return programs.compile_programs(recipe, DATASET, mesh_of(1), scan=scan)


def trained(made, recipe, seed=0):
    """Returns the states at the start and after each epoch, and all losses."""
    states, losses = [made.init(seed)], []
    for epoch in range(programs.epochs(recipe)):
        kept = jax.tree.map(jnp.copy, states[-1])
        state, found = made.epoch(states[-1], seed, epoch)
        states[-1] = kept
        states.append(state)
        losses.extend(np.asarray(jax.device_get(found)).tolist())
    return states, losses


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(small())


@pytest.fixture(scope="module")
def by_steps(recipe):
    made = compiled(recipe, scan=False)
    return made, *trained(made, recipe)


# The first layer


def test_whitening_whitens():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(40, 9, 8, 3)) @ rng.normal(size=(3, 3))
    mixed += np.roll(mixed, 1, axis=2)
    kernel = whitening_kernel(jnp.float32(mixed), epsilon=1e-9)
    assert kernel.shape == (2, 2, 3, 24)
    windows = np.lib.stride_tricks.sliding_window_view(mixed, (2, 2), (1, 2))
    out = np.einsum("nyxcij,ijco->nyxo", windows, np.float64(kernel))
    first = out[..., :12].reshape(-1, 12)
    moments = first.T @ first / len(first)
    np.testing.assert_allclose(moments, np.eye(12), atol=2e-3)
    np.testing.assert_allclose(kernel[..., 12:], -kernel[..., :12])
    # Filters grow: the first ones belong to the largest eigenvalues.
    size = np.linalg.norm(np.float64(kernel).reshape(12, 24)[:, :12], axis=0)
    assert (np.diff(size) > 0).all()


def test_epsilon_bounds_filters_of_what_does_not_vary():
    gray = np.random.default_rng(0).normal(size=(50, 6, 6, 1)) * np.ones(3)
    kernel = np.float64(whitening_kernel(jnp.float32(gray), epsilon=1e-2))
    assert np.isfinite(kernel).all()
    size = np.linalg.norm(kernel.reshape(12, 24), axis=0)
    np.testing.assert_allclose(size[11], 10, rtol=1e-3)


# The network


@pytest.mark.parametrize("inputs, outputs", [(3, 5), (5, 3), (4, 4)])
def test_identity_kernel(inputs, outputs):
    kernel = identity_kernel(jax.random.key(0), (3, 3, inputs, outputs))
    x = np.random.default_rng(0).normal(size=(2, 5, 5, inputs))
    y = convolved(x, np.float64(kernel))
    same = min(inputs, outputs)
    np.testing.assert_array_equal(y[..., :same], x[..., :same])
    rest = np.float64(kernel)[..., same:]
    if rest.size:
        bound = 1 / math.sqrt(9 * inputs)
        assert np.abs(rest).max() <= bound
        np.testing.assert_allclose(rest.std(), bound / math.sqrt(3), rtol=0.15)


def network(config, norm=None):
    return make_recipe(config, DATASET, norm or norm_of()).model


@pytest.mark.parametrize(
    "config, parameters, norms",
    [
        # The paper says 1.97M of airbench94, the fixed filters among them.
        (cifar10_94.get_config, 1_971_640, 6),
        (cifar10_96.get_config, 9_915_416, 9),
    ],
)
def test_sizes(config, parameters, norms):
    config = config()
    config.batch_size = 1
    shapes = jax.eval_shape(
        functools.partial(network(config).init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 32, 32, 3)),
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(shapes["frozen"]))
    assert (total + frozen if config.layers == 2 else total) == parameters
    paths = jax.tree_util.tree_leaves_with_path(shapes["params"])
    names = [path[-1].key for path, _ in paths]
    assert names.count("bias") == norms + 1 and "scale" not in names


def convolved(x, kernel):
    """3x3 with zeros at the border, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def pooled(x):
    n, height, width, c = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, c).max((2, 4))


@pytest.mark.parametrize("layers", [2, 3])
def test_network_is_what_it_should_be_in_float64(layers):
    rng = np.random.default_rng(0)
    config = small(layers=layers, logit_scale=0.3, widths=(8, 12, 8))
    net = network(config)
    x = rng.normal(size=(2, 17, 16, 3))
    init = functools.partial(net.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.float32(x))
    # About as large as what follows them, for the GELU to bend it.
    filled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.float32(
            rng.uniform(0.5, 2, leaf.shape)
            if path[-1].key == "var"
            else rng.normal(
                0, 1 / np.sqrt(leaf.size / leaf.shape[-1]), leaf.shape
            )
        ),
        shapes,
    )
    values = jax.tree.map(np.float64, filled)
    params, stats = values["params"], values["batch_stats"]
    filters = values["frozen"]["whitening"]["kernel"]
    apply = jax.jit(functools.partial(net.apply, train=False))
    got = apply(filled, jnp.float32(x))

    def norm(x, group, number):
        of = stats[group][f"BatchNorm_{number}"]
        bias = params[group][f"BatchNorm_{number}"]["bias"]
        return (x - of["mean"]) / np.sqrt(of["var"]) + bias

    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (1, 2))
    y = np.einsum("nyxcij,ijco->nyxo", windows, filters)
    y = gelu(y + params["whitening"]["bias"])
    for group in ("Group_0", "Group_1", "Group_2"):
        kernels = [params[group][f"Conv_{i}"]["kernel"] for i in range(layers)]
        y = before = gelu(norm(pooled(convolved(y, kernels[0])), group, 0))
        y = norm(convolved(y, kernels[1]), group, 1)
        if layers == 3:
            y = norm(convolved(gelu(y), kernels[2]), group, 2) + before
        y = gelu(y)
    want = 0.3 * (y.max((1, 2)) @ params["head"]["kernel"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 0.1


def test_head_begins_with_the_deviation_asked_for():
    def kernel(**changes):
        config = small(widths=(8, 8, 400), **changes)
        shape = jnp.zeros((1, 16, 16, 3))
        init = jax.jit(functools.partial(network(config).init, train=False))
        params = init(jax.random.key(0), shape)
        return np.asarray(params["params"]["head"]["kernel"])

    np.testing.assert_allclose(kernel(head_std=1.0).std(), 1, rtol=0.05)
    # PyTorch's default: uniform within one over the root of the inputs.
    assert 0.045 < np.abs(kernel()).max() <= 1 / 20


# Augmentation


def drawn(epoch, index=tuple(range(50)), seed=0, **changes):
    fields = {"flip": "alternating", "translate": 2, "last_corner": (20, 9)}
    draw = functools.partial(augment.draw, **{**fields, **changes})
    return jax.jit(draw)(jax.random.key(seed), jnp.array(index), epoch)


def test_flips_alternate():
    flips = [np.asarray(drawn(epoch).flip) for epoch in range(4)]
    assert 10 < flips[0].sum() < 40
    np.testing.assert_array_equal(flips[1], ~flips[0])
    np.testing.assert_array_equal(flips[2], flips[0])
    np.testing.assert_array_equal(flips[3], ~flips[0])
    assert (np.asarray(drawn(0, seed=1).flip) != flips[0]).any()
    by_chance = [np.asarray(drawn(e, flip="random").flip) for e in range(2)]
    assert 10 < (by_chance[0] != by_chance[1]).sum() < 40
    assert not np.asarray(drawn(0, flip="none").flip).any()


def test_draws_belong_to_the_example_and_cover_what_they_may():
    whole = drawn(3)
    some = drawn(3, index=(7, 41, 2))
    for all_of_them, picked in zip(whole, some):
        np.testing.assert_array_equal(
            all_of_them[jnp.array([7, 41, 2])], picked
        )
    many = drawn(0, index=tuple(range(2000)))
    assert set(np.unique(many.offset)) == {-2, -1, 0, 1, 2}
    corners = np.asarray(many.corner)
    assert corners.min() == 0 and corners.max(0).tolist() == [20, 9]
    assert (np.asarray(drawn(1).offset) != np.asarray(drawn(0).offset)).any()


def test_view_against_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 7, 9, 3), np.uint8)
    index = np.array([4, 0, 4, 5])
    flip = np.array([True, False, False, True])
    offset = np.array([[3, -2], [0, 0], [-3, 1], [1, 3]])
    got = augment.view(images, *map(jnp.array, (index, flip, offset)))
    assert got.dtype == jnp.uint8
    for i, (dy, dx) in enumerate(offset):
        image = images[index[i]][:, :: -1 if flip[i] else 1]
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), "reflect")
        want = padded[3 + dy : 10 + dy, 3 + dx : 12 + dx]
        np.testing.assert_array_equal(got[i], want)


def test_blank_against_numpy():
    images = np.random.default_rng(0).normal(size=(3, 8, 9, 2))
    corner = np.array([[0, 0], [5, 6], [2, 3]])
    want = images.copy()
    for image, (y, x) in zip(want, corner):
        image[y : y + 3, x : x + 3] = 0
    got = augment.blank(jnp.float32(images), jnp.array(corner), 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert augment.blank(images, corner, 0) is images


# Optimization


def test_triangle():
    rate = optimizer.triangle(476, start=0.2, peak=0.23, end=0.07)
    steps = np.array([0, 50, 109, 300, 475, 476])  # int(0.23 * 476) is 109
    down = 1 - (1 - 0.07) * (steps - 109) / (476 - 109)
    want = np.where(steps < 109, 0.2 + 0.8 * steps / 109, down)
    np.testing.assert_allclose([rate(s) for s in steps], want, rtol=1e-5)
    linear = optimizer.triangle(10, start=1.0, peak=0.0, end=0.0)
    got = [float(linear(s)) for s in (0, 5, 10)]
    np.testing.assert_allclose(got, [1, 0.5, 0], atol=1e-6)


PARAMS = {
    "Group_0": {"BatchNorm_0": {"bias": 3}, "Conv_0": {"kernel": (3, 3, 4, 5)}},
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


def stepped(config, steps, bias_steps):
    """Returns parameters before and after each of some steps, as float64."""
    made = optimizer.make_optimizer(config, steps=steps, bias_steps=bias_steps)
    params = arrays(0)
    state, kept = made.init(params), [params]
    for number in range(4):
        updates, state = made.update(arrays(1 + number), state, params)
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
    "kernel": lambda tree: tree["Group_0"]["Conv_0"]["kernel"],
    "norm_bias": lambda tree: tree["Group_0"]["BatchNorm_0"]["bias"],
    "head": lambda tree: tree["head"]["kernel"],
    "whitening_bias": lambda tree: tree["whitening"]["bias"],
}


@pytest.mark.parametrize("group", LEAVES)
def test_sgd_by_hand(group):
    config = small(batch_size=512, learning_rate=3000.0, weight_decay=900.0)
    got = stepped(config, steps=8, bias_steps=2)
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
    config = small("muon", batch_size=2000)
    got = stepped(config, steps=8, bias_steps=3)
    shares = 1 - np.arange(4) / 8
    if group == "whitening_bias":
        shares = np.maximum(1 - np.arange(4) / 3, 0)
    peak = 0.67 if group == "head" else 0.053
    want = by_hand(LEAVES[group], (peak, shares), 0.85, 2e-6 * 2000)
    for one, other in zip(map(LEAVES[group], got), want):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-5)


def test_muon_step_by_hand():
    first, second = stepped(small("muon"), steps=8, bias_steps=3)[:2]
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


# Whole runs


def test_an_epoch_holds_every_example_once(recipe):
    make = jax.jit(functools.partial(step.plan, recipe, DATASET.train))
    first, second, other = make(0, 0), make(0, 1), make(1, 0)
    for plan in (first, second, other):
        assert plan.index.shape == (6, 16)
        assert len(np.unique(plan.index)) == 96
    assert (first.index != second.index).any()
    assert (first.index != other.index).any()
    # An image is seen the other way round in the next epoch.
    flips = [
        dict(zip(plan.index.ravel().tolist(), plan.augmentation.flip.ravel()))
        for plan in (first, second)
    ]
    both = {*flips[0]} & {*flips[1]}
    assert len(both) > 80
    assert all(flips[0][i] != flips[1][i] for i in both)


def test_what_moves_and_what_does_not(by_steps):
    _, (start, one_epoch, end), losses = by_steps
    assert len(losses) == STEPS and int(end.step) == STEPS
    kernels = [s.frozen["whitening"]["kernel"] for s in (start, one_epoch, end)]
    assert np.abs(kernels[0]).max() > 0.1
    np.testing.assert_array_equal(kernels[0], kernels[2])
    bias = [
        np.asarray(s.params["whitening"]["bias"])
        for s in (start, one_epoch, end)
    ]
    assert np.abs(bias[1]).max() > 1e-5 and not bias[0].any()
    np.testing.assert_allclose(bias[2], bias[1], rtol=1e-5)
    moving = [
        jax.tree_util.tree_leaves_with_path((state.params, state.batch_stats))
        for state in (one_epoch, end)
    ]
    for (path, before), (_, after) in zip(*moving):
        frozen = "whitening" in jax.tree_util.keystr(path)
        if not frozen:
            assert (np.asarray(before) != np.asarray(after)).any(), path
    # The run ends with the slow values.
    for fast, slow in zip(
        jax.tree.leaves((end.params, end.batch_stats)),
        jax.tree.leaves(end.slow),
    ):
        np.testing.assert_array_equal(fast, slow)


def test_a_bias_that_has_learned_changes_nothing_else(recipe, by_steps):
    late = recipe._replace(
        optimizer=optimizer.make_optimizer(small(), steps=STEPS, bias_steps=0)
    )
    state = by_steps[1][0]

    @jax.jit
    def both(state, train, batch):
        return [
            step.train_step(late, state, train, batch, train_bias=learns)
            for learns in (True, False)
        ]

    (one, loss), (other, same) = both(state, DATASET.train, first_batch(recipe))
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for new in (one, other):
        np.testing.assert_array_equal(new.params["whitening"]["bias"], 0)


def first_batch(recipe):
    batches = jax.jit(functools.partial(step.plan, recipe))
    return jax.tree.map(lambda a: a[0], batches(DATASET.train, 0, 0))


def test_scan_changes_nothing(recipe, by_steps):
    made, states, losses = by_steps
    other = compiled(recipe, scan=True)
    others, found = trained(other, recipe)
    np.testing.assert_allclose(found, losses, rtol=2e-4)
    assert_alike(states[1], others[1])
    assert made.evaluate(states[0]) == other.evaluate(others[0])


def assert_alike(one, other):
    """Where two maxima are almost equal a gradient may go either way."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=5e-3)


def test_four_devices_change_nothing(by_steps):
    gradient = jax.shard_map(
        jax.grad(lambda x: jax.lax.erf(x).sum()),
        mesh=mesh_of(4),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    try:
        jax.eval_shape(gradient, jnp.ones(4))
    except ValueError:  # jax 0.12.0, in float32
        pytest.skip("JAX has no derivative of erf under shard_map here")
    _, states, losses = by_steps
    recipe = recipe_of(small(devices=4))
    epoch = functools.partial(programs._scanned_epoch, recipe, 6, True)
    given = jax.device_get(states[0]), DATASET.train, np.int32(0), np.int32(0)
    program, _ = programs._compiled(mesh_of(4), epoch, *given)
    state, found = program(*given)
    np.testing.assert_allclose(found, losses[:6], rtol=2e-4)
    assert_alike(states[1], state)


def test_seeds_share_the_programs_and_differ(recipe, by_steps):
    made, states, losses = by_steps
    _, again = trained(made, recipe)
    assert again == losses
    others, found = trained(made, recipe, seed=1)
    assert abs(np.array(found) - losses).max() > 1e-2
    # The filters come from the data alone.
    np.testing.assert_array_equal(
        others[0].frozen["whitening"]["kernel"],
        states[0].frozen["whitening"]["kernel"],
    )


def test_one_device_waits_for_no_other(by_steps):
    def reductions(devices):
        recipe = recipe_of(small(devices=devices, dtype="float16"))
        program = programs._jitted(
            mesh_of(devices),
            functools.partial(step.train_step, recipe, train_bias=True),
        )
        state = jax.device_get(by_steps[1][0])
        lowered = program.lower(state, DATASET.train, first_batch(recipe))
        return lowered.as_text().count("all_reduce")

    # Four layers forwards and backwards, and gradients.
    assert reductions(4) > 8
    assert reductions(1) == 0


def test_the_program_that_a_gpu_gets(by_steps):
    recipe = recipe_of(small(dtype="float16"))
    given = jax.device_get(by_steps[1][0]), DATASET.train, 0, 0

    def text(learns):
        epoch = functools.partial(programs._scanned_epoch, recipe, 6, learns)
        traced = jax.jit(epoch).trace(*given)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def convolutions(text):
        return re.findall(r"stablehlo.convolution.*-> tensor<.*x(f\d+)>", text)

    # Five forwards, four by their kernels and three by their inputs. While the
    # first bias learns there is one more by the input, back to it.
    assert convolutions(text(False)) == ["f16"] * 12
    assert convolutions(text(True)) == ["f16"] * 13
    # One loop, and no branch but that of the norms, one function for each width.
    # XLA puts it into a CUDA graph, so that no host is asked.
    assert text(True).count("stablehlo.while") == 1
    assert text(True).count("stablehlo.case") == 2


# Evaluation


@pytest.fixture(scope="module")
def logits(recipe, by_steps):
    """Returns the logits of any images by a network that has learned a bit."""
    state = by_steps[1][-1]

    @jax.jit
    def look(images):
        return step.view_logits(recipe, state, images, jnp.arange(len(images)))

    return look


def test_views_of_what_is_symmetric(logits):
    images = DATASET.test.images[:10]
    symmetric = np.concatenate([images[:, :, :8], images[:, :, 7::-1]], 2)
    got = np.asarray(logits(symmetric))
    assert got.shape == (3, 2, 10, CLASSES)
    np.testing.assert_allclose(got[:, 0], got[:, 1], rtol=1e-4, atol=1e-5)
    other = np.asarray(logits(images))
    assert np.abs(other[:, 0] - other[:, 1]).max((1, 2)).min() > 1e-4
    assert np.abs(other[0] - other[1]).max() > 1e-4
    same = np.full_like(images, 90)
    got = np.asarray(logits(same))
    np.testing.assert_allclose(
        got, np.broadcast_to(got[:1, :1], got.shape), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("devices, scan", [(1, False), (1, True), (4, True)])
def test_every_test_image_counts_once(by_steps, logits, devices, scan):
    state = by_steps[1][-1]
    views = np.float64(logits(DATASET.test.images))
    plain = views[0, 0].argmax(-1)
    mean = views[0].mean(0) / 2 + views[1:].mean((0, 1)) / 2
    # Every label is right, by one way of looking, but for two images.
    for guess, name in ((plain, "plain"), (mean.argmax(-1), "views")):
        labels = guess.astype(np.int32)
        labels[[0, TEST - 1]] = (labels[[0, TEST - 1]] + 1) % CLASSES
        dataset = DATASET._replace(test=DATASET.test._replace(labels=labels))
        made = evaluation(dataset, devices, scan, state)
        assert int(getattr(made, name)) == TEST - 2


def evaluation(dataset, devices, scan, state):
    """What the programs do, without compiling those of training."""
    recipe = recipe_of(small(devices=devices))
    whole = functools.partial(programs._scanned_test, recipe)
    one = functools.partial(step.test_step, recipe)
    mesh, state = mesh_of(devices), jax.device_get(state)
    if scan:
        made, _ = programs._compiled(mesh, whole, state, dataset.test)
        return made(state, dataset.test)
    starts = programs._starts(recipe, dataset.test)
    made, _ = programs._compiled(mesh, one, state, dataset.test, starts[0])
    each = [made(state, dataset.test, start) for start in starts]
    return jax.tree.map(lambda *counts: sum(counts), *each)


# Variants, and the program


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16", "optimizer": "muon"},
        {"dtype": "bfloat16", "cutout": 6, "layers": 3},
        {"norm": "ghost", "norm_options": {"normalize_over": 8}},
        {"norm": "flax"},
        {"norm": "none", "learning_rate": 1.0},
    ],
    ids=str,
)
def test_variants_take_a_step(monkeypatch, changes):
    monkeypatch.setattr(data, "load", lambda *_, **__: DATASET)
    prepared = prepare(small(widths=(8,), **changes))
    recipe = prepared.recipe

    @jax.jit
    def one(train, batch):
        state = step.init_state(recipe, train, 0)
        return step.train_step(recipe, state, train, batch, train_bias=True)

    state, loss = one(DATASET.train, first_batch(recipe))
    # With the logits about zero all classes are as likely.
    assert float(loss) == pytest.approx(math.log(CLASSES), rel=0.1)
    for leaf in jax.tree.leaves((state.params, state.batch_stats)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_learns_and_reports(tmp_path, capsys):
    config = small(
        dataset="digits",
        flip="none",
        widths=(8, 16, 16),
        logit_scale=0.5,
        whitening_bias_epochs=9,
        batch_size=64,
        test_batch_size=200,
        epochs=3.5,
        seeds=2,
    )
    summary = train(config, tmp_path / "run")
    assert min(summary["test_accuracy_of_seeds"]) > 0.85
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["steps"] == 77
    accuracies = summary["test_accuracy_of_seeds"]
    assert summary["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["test_accuracy_deviation"] == pytest.approx(
        np.std(accuracies, ddof=1)
    )
    assert summary["images_per_second"] == pytest.approx(
        77 * 64 / summary["seconds"]
    )
    assert not summary["on_accelerator"]
    out = capsys.readouterr().out
    assert out.count("the times and images/s mean nothing") == 2
    assert out.count("\nseed ") == 2 and table(summary) in out
    assert "test accuracy, test-time augmentation" in out
    with pytest.raises(UserError, match="holds another run"):
        train(small(dataset="digits", epochs=1.0), tmp_path / "run")
    assert train(config, tmp_path / "run") == summary
    assert table(summary) in capsys.readouterr().out


def test_one_run(recipe, by_steps):
    made, states, losses = by_steps
    found = run(made, Prepared(None, DATASET, recipe), 0)
    assert found.seed == 0 and found.seconds > 0
    correct = made.evaluate(states[-1])
    assert found.accuracy == int(correct.plain) / TEST
    assert found.augmented == int(correct.views) / TEST
    assert found.loss == pytest.approx(np.mean(losses[6:]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "mouon"}, "did you mean 'muon'"),
        ({"flip": "alternate"}, "did you mean 'alternating'"),
        ({"dtype": "float8"}, "dtype='float8' is unknown"),
        ({"norm": "jaxbm"}, "norm='jaxbm' is unknown"),
        ({"epochs": 0.0}, r"epochs must be in \(0, 1e6\]; got 0.0"),
        ({"batch_size": 0}, r"batch_size must be in \[1, 1e6\]; got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
        ({"translate": -1}, r"translate must be in \[0, 1000\]; got -1"),
        ({"layers": 4}, r"layers must be in \[2, 3\]; got 4"),
        ({"widths": (8, 0, 8)}, "every entry of widths must be in"),
        ({"devices": 3}, "batch_size=16 does not split over devices=3"),
        ({"devices": 16}, "devices=16, but there are 8 here. Simulate more"),
        ({"batch_size": 2000}, "more than the 1437 examples of digits"),
        ({"cutout": 32}, "cutout=32 must be less than the 32 pixels"),
    ],
    ids=str,
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        prepare(small(dataset="digits", **changes))


def test_digits_are_enlarged():
    prepared = prepare(small(dataset="digits"))
    images = prepared.dataset.train.images
    assert images.shape[1:] == (32, 32, 1)
    np.testing.assert_array_equal(
        images[:, ::4, 1::4], data.load("digits").train.images
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.epoch=3"], "There is no config.epoch; did you mean"),
        (
            ["--config=none.py"],
            "There is no file none.py; configs/ holds cifar10_94.py, ",
        ),
        (["--config.seeds=0"], "seeds must be in [1, 10000]; got 0."),
        ([f"--config={digits.__file__}"], "The config has no bias_scale: it"),
        (
            [f"--config={cifar10_94.__file__}:adam"],
            "configs/cifar10_94.py has no 'adam'; take one of sgd, muon",
        ),
    ],
)
def test_bad_command_line_is_one_clear_line(arguments, message):
    done = run_command(*arguments, module="train.fast")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.fast: {message}")


FULL = data.Dataset(
    data.Split(np.zeros((50_000, 16, 16, 3), np.uint8), np.zeros(50_000, int)),
    data.Split(np.zeros((10_000, 16, 16, 3), np.uint8), np.zeros(10_000, int)),
    CLASSES,
)


@pytest.mark.parametrize(
    "config, steps, ends",
    [
        # ceil(48 x 9.9), 48 x 37 and 25 x 8 steps.
        (cifar10_94.get_config(), 476, (0.2, 0.07)),
        (cifar10_94.get_config("muon"), 200, (1.0, 0.0)),
        (cifar10_96.get_config(), 1776, (0.2, 0.0)),
    ],
)
def test_configs_stand_for_the_published_steps(config, steps, ends):
    made = make_recipe(config, FULL, norm_of())
    assert made.steps == steps
    assert (
        sum(
            programs.kind(made, epoch)[0]
            for epoch in range(programs.epochs(made))
        )
        == steps
    )
    rate = optimizer.triangle(
        steps,
        start=config.rate_start,
        peak=config.rate_peak,
        end=config.rate_end,
    )
    got = float(rate(0)), float(rate(steps))
    np.testing.assert_allclose(got, ends, atol=1e-6)


def test_the_last_epoch_is_a_part_of_one():
    made = make_recipe(cifar10_94.get_config(), FULL, norm_of())
    kinds = [programs.kind(made, epoch) for epoch in range(10)]
    assert kinds == [(48, True)] * 3 + [(48, False)] * 6 + [(44, False)]
