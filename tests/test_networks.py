"""Networks against their papers, in float64; and the configs that name them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import (
    arguments,
    defaults,
    digits,
    large_batch,
    preact_cifar,
    resnet18_cifar,
    resnet20_cifar10,
    resnet20_cifar10_one_cycle,
    resnet20_cifar10_short,
    resnet_cifar,
    wide_cifar,
)
from jaxbn.linen import BatchNorm
from tests.helpers import numpy_networks
from train import UserError, networks
from train.norms import Affine
from train.preact import PreActBlock
from train.resnet import Block, convolution
from train.resnet18 import ProjectionBlock

# One block a stage, but two in ResNet-18.
SMALL = {
    "resnet": {"depth": 8},
    "preact": {"depth": 8},
    "preact_bottleneck": {"depth": 11},
    "wide": {"depth": 10, "widen": 2},
    "resnet18": {"depth": 18},
}


def config_of(model, **changes):
    fields = {"width": 4, "widen": 1, "zero_init_gamma": False}
    return ConfigDict({"model": model, **fields, **changes})


def build(config, *, num_classes=10, norm=BatchNorm, dtype=jnp.float32):
    return networks.make(
        config, num_classes=num_classes, norm=norm, dtype=dtype
    )


def shapes_of(net, size=32):
    return jax.eval_shape(
        functools.partial(net.init, train=False),
        jax.random.key(0),
        jnp.zeros((1, size, size, 3)),
    )


def total(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Sizes


@pytest.mark.parametrize(
    "model, depth, options, classes, parameters, norms",
    [
        # In the papers' tables: 0.27M, 0.46M, 0.66M, 0.85M and 1.7M.
        ("resnet", 20, {}, 10, 269_722, 19),
        ("resnet", 32, {}, 10, 464_154, 31),
        ("resnet", 44, {}, 10, 658_586, 43),
        ("resnet", 56, {}, 10, 853_018, 55),
        ("resnet", 110, {}, 10, 1_727_962, 109),
        # 1.7M both; the first as many as the ResNet of its depth.
        ("preact", 110, {}, 10, 1_727_962, 109),
        ("preact_bottleneck", 164, {}, 10, 1_703_258, 163),
        # 2.7M and 36.5M.
        ("wide", 16, {"widen": 4}, 10, 2_748_890, 13),
        ("wide", 28, {"widen": 10}, 10, 36_479_194, 25),
        ("wide", 28, {"widen": 10}, 100, 36_536_884, 25),
        ("resnet18", 18, {"width": 64}, 10, 11_173_962, 20),
    ],
)
def test_published_sizes(model, depth, options, classes, parameters, norms):
    asked = []

    def norm(**given):
        asked.append(given)
        return BatchNorm(**given)

    config = config_of(model, depth=depth, **{"width": 16, **options})
    variables = shapes_of(build(config, num_classes=classes, norm=norm))
    assert total(variables["params"]) == parameters
    # What the factory makes is all there is, and it is told what it must be.
    assert len(asked) == norms
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * norms
    for given in asked:
        assert given["use_running_average"] and given["dtype"] == jnp.float32


@pytest.mark.parametrize("model", SMALL)
def test_another_norm_reaches_every_layer(model):
    config = config_of(model, **SMALL[model])
    with_norm = shapes_of(build(config), 8)
    without = shapes_of(build(config, norm=Affine), 8)
    assert "batch_stats" not in without
    assert total(without["params"]) == total(with_norm["params"])


# Equations


@pytest.mark.parametrize("model", SMALL)
def test_network_is_its_equations(model):
    net = build(config_of(model, **SMALL[model]))
    rng = np.random.default_rng(0)
    variables = numpy_networks.randomized(shapes_of(net, 8), rng)
    images = rng.normal(size=(2, 8, 8, 3))
    got = jax.jit(functools.partial(net.apply, train=False))(
        jax.tree.map(jnp.float32, variables), jnp.float32(images)
    )
    layers = numpy_networks.Layers(
        variables["params"], variables["batch_stats"]
    )
    want = getattr(numpy_networks, model)(layers, images)
    assert got.dtype == jnp.float32 and want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", SMALL)
def test_bfloat16_computes_so_and_keeps_its_parameters(model):
    net = build(config_of(model, **SMALL[model]), dtype=jnp.bfloat16)
    variables = shapes_of(net, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
        jnp.dtype(jnp.float32)
    }
    logits, state = jax.eval_shape(
        functools.partial(
            net.apply, train=False, capture_intermediates=True, mutable=True
        ),
        variables,
        jnp.zeros((2, 8, 8, 3)),
    )
    assert logits.dtype == jnp.float32
    intermediates = state["intermediates"]
    blocks = [name for name in intermediates if "Block" in name]
    inside = jax.tree.leaves([intermediates[name] for name in blocks])
    assert {leaf.dtype for leaf in inside} == {jnp.dtype(jnp.bfloat16)}


# Start


@pytest.fixture
def plain_kernels(monkeypatch):
    """Kernels from numpy: a compiled truncated normal takes seconds each."""
    rng = np.random.default_rng(0)

    def draw(key, shape, dtype=jnp.float32):
        spread = np.sqrt(2 / np.prod(shape[:-1]))
        return jnp.asarray(rng.normal(0, spread, shape), dtype)

    monkeypatch.setattr(nn.initializers, "he_normal", lambda: draw)


LAST = {
    "resnet": ("BatchNorm_1", "scale"),
    "preact": ("Conv_1", "kernel"),
    "preact_bottleneck": ("Conv_2", "kernel"),
    "wide": ("Conv_1", "kernel"),
    "resnet18": ("BatchNorm_1", "scale"),
}


@pytest.mark.parametrize("model", SMALL)
def test_zero_init_is_of_the_last_layer_of_every_block(model, monkeypatch):
    def marked(key, shape, dtype=None):
        return jnp.zeros(shape, jnp.float16)

    # Nothing is computed: the dtype tells what begins at zero.
    monkeypatch.setattr(nn.initializers, "zeros", marked)
    for asked in (True, False):
        net = build(config_of(model, zero_init_gamma=asked, **SMALL[model]))
        params = shapes_of(net, 8)["params"]
        blocks = [name for name in params if "Block" in name]
        assert len(blocks) == (8 if model == "resnet18" else 3)
        found = {
            tuple(key.key for key in path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if leaf.dtype == jnp.float16
        }
        want = {(block, *LAST[model]) for block in blocks} if asked else set()
        assert found == want


@pytest.mark.parametrize(
    "kind, options, last",
    [
        (Block, {}, "scale"),
        (PreActBlock, {"bottleneck": False, "project": False}, "kernel"),
        (PreActBlock, {"bottleneck": False, "project": True}, "kernel"),
        (PreActBlock, {"bottleneck": True, "project": True}, "kernel"),
        (ProjectionBlock, {}, "scale"),
    ],
)
def test_zero_init_starts_as_the_shortcut_and_learns(
    kind, options, last, plain_kernels
):
    options = dict(options)
    if kind is PreActBlock:
        options |= {"first": False, "zero_init": True}
    else:
        options |= {"zero_init_gamma": True}
    block = kind(
        width=8,
        stride=2,
        conv=convolution(jnp.float32),
        norm=functools.partial(BatchNorm, use_running_average=False),
        **options,
    )
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 4, 4, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(4, 2, 2, 8)), jnp.float32)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    params = variables.pop("params")
    (zero,) = (
        (path[0].key, path[1].key)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[1].key != "bias" and not np.any(leaf)
    )
    assert zero[1] == last

    @jax.jit
    def run(params, variables, x, weights):
        def loss(params):
            y, _ = block.apply(
                {"params": params, **variables}, x, mutable=["batch_stats"]
            )
            return (y * weights).sum(), y

        grads, y = jax.grad(loss, has_aux=True)(params)
        return y, grads

    def change(path, leaf):
        branch = path[0].key.startswith("Conv") and np.any(leaf)
        return leaf[::-1] * 2 + 1 if branch else leaf

    y, grads = run(params, variables, x, weights)
    changed = jax.tree_util.tree_map_with_path(change, params)
    same, _ = run(changed, variables, x, weights)
    np.testing.assert_array_equal(y, same)
    assert np.any(y)
    assert np.any(grads[zero[0]][zero[1]]), "it would stay as it starts"


# What cannot be


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "widee"}, "model='widee' is unknown; did you mean 'wide'?"),
        ({"depth": 21}, "depth=21 must be 6n + 2, such as 20 or 26."),
        ({"depth": 5}, "depth=5 must be 6n + 2, such as 8."),
        (
            {"model": "preact_bottleneck", "depth": 110 + 54 + 1},
            "depth=165 must be 9n + 2, such as 164 or 173.",
        ),
        ({"model": "wide"}, "depth=20 must be 6n + 4, such as 16 or 22."),
        ({"model": "resnet18"}, "depth=20 must be 18 for ResNet-18."),
        ({"width": 0}, "width must be at least 1; got 0."),
        ({"model": "wide", "widen": -1}, "widen must be at least 1; got -1."),
        ({"widen": 4}, "widen=4 is for model='wide'; with model='resnet' set"),
    ],
)
def test_network_that_cannot_be(changes, message):
    config = config_of("resnet", depth=20)
    config.update(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        build(config)


# Configs


@pytest.mark.parametrize(
    "module, argument, title, classes",
    [
        (digits, None, "ResNet-8", 10),
        (resnet20_cifar10, None, "ResNet-20", 10),
        (resnet20_cifar10_short, None, "ResNet-20", 10),
        (resnet20_cifar10_one_cycle, None, "ResNet-20", 10),
        (resnet_cifar, None, "ResNet-20", 10),
        (resnet_cifar, "56,cifar100", "ResNet-56", 100),
        (resnet_cifar, "cifar100, 110", "ResNet-110", 100),
        (preact_cifar, None, "PreActResNet-110", 10),
        (preact_cifar, "164", "PreActResNet-164", 10),
        (wide_cifar, None, "WRN-16-4", 10),
        (wide_cifar, "28-10,cifar100", "WRN-28-10", 100),
        (resnet18_cifar, "cifar100", "ResNet-18", 100),
        (large_batch, "2048,32", "ResNet-32", 10),
    ],
)
def test_config(module, argument, title, classes):
    given = [] if argument is None else [argument]
    config = module.get_config(*given)
    assert networks.title(config) == title
    assert config.dataset == ("cifar100" if classes == 100 else config.dataset)
    build(config, num_classes=classes)
    # Nothing that the loop would not look at.
    assert set(config) == set(defaults.get_config())


def test_one_network_has_one_config():
    assert (
        resnet_cifar.get_config().to_json()
        == resnet20_cifar10.get_config().to_json()
    )


def test_recipes_of_the_papers():
    config = wide_cifar.get_config("28-10")
    assert config.boundaries == (23_400, 46_800, 62_400)
    assert (config.decay_factor, config.weight_decay) == (0.2, 5e-4)
    config = resnet_cifar.get_config("110")
    assert round(config.warmup_epochs * 390) == 400
    assert (config.warmup_shape, config.warmup_start) == ("constant", 0.1)
    config = large_batch.get_config("1024")
    assert (config.batch_size, config.learning_rate) == (1024, 0.8)
    # In half of the epochs, of 48 batches, at the full rate.
    assert config.boundaries == (82 * 48, 123 * 48)
    assert config.warmup_start * config.learning_rate == pytest.approx(0.1)


@pytest.mark.parametrize(
    "module, argument, message",
    [
        (
            resnet_cifar,
            "57",
            "configs/resnet_cifar.py has no '57'; use one of 20, 32, 44, 56, "
            "110 and one of cifar10, cifar100, such as configs/resnet_cifar.py:"
            "110,cifar100.",
        ),
        (wide_cifar, "16-4,cifar", "has no 'cifar'; use one of 16-4, 28-10"),
        (preact_cifar, "110,164", "cannot be 110 and 164; use one of 110"),
        (resnet18_cifar, "18", "has no '18'; use one of cifar10, cifar100, "),
        (large_batch, "100", "has no '100'; use one of 1024, 256, 512"),
    ],
)
def test_argument_that_there_is_not(module, argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        module.get_config(argument)


def test_arguments_stand_in_any_order():
    groups = ("1", "2"), ("a", "b")
    choose = functools.partial(arguments.choose, "file.py")
    assert choose("", *groups) == ["1", "a"]
    assert choose("b", *groups) == ["1", "b"]
    assert choose(" b, 2 ", *groups) == ["2", "b"]
