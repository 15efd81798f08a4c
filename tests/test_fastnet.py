"""FastNet: whitening, sizes and equations in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from configs import cifar10_94, cifar10_96
from tests.helpers.fast_runs import experiment_of, small
from train import UserError
from train.fastnet import check_widths, enlarge, identity_kernel
from train.whitening import whitening_kernel


def filtered_moments(images, kernel):
    """Second moments of the first half of the outputs, in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(images, (2, 2), (1, 2))
    out = np.einsum("nyxcij,ijco->nyxo", windows, np.float64(kernel))
    first = out[..., : out.shape[-1] // 2].reshape(-1, out.shape[-1] // 2)
    return first.T @ first / len(first)


def test_whitening_whitens():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(40, 9, 8, 3)) @ rng.normal(size=(3, 3))
    mixed += np.roll(mixed, 1, axis=2)
    kernel = whitening_kernel(jnp.float32(mixed), epsilon=1e-9)
    assert kernel.shape == (2, 2, 3, 24)
    moments = filtered_moments(mixed, kernel)
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


def network(config):
    return experiment_of(config).recipe.model


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
    assert (
        total + frozen if config.fastnet.layers == 2 else total
    ) == parameters
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
    config = small(widths=(8, 12, 8))
    config.fastnet.layers, config.fastnet.logit_scale = layers, 0.3
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
    for group in ("Block_0", "Block_1", "Block_2"):
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
    def kernel(head_std=None):
        config = small(widths=(8, 8, 400))
        config.fastnet.head_std = head_std
        shape = jnp.zeros((1, 16, 16, 3))
        init = jax.jit(functools.partial(network(config).init, train=False))
        params = init(jax.random.key(0), shape)
        return np.asarray(params["params"]["head"]["kernel"])

    np.testing.assert_allclose(kernel(head_std=1.0).std(), 1, rtol=0.05)
    # PyTorch's default: uniform within one over the root of the inputs.
    assert 0.045 < np.abs(kernel()).max() <= 1 / 20


def test_initialization_computes_the_first_layer_from_its_input():
    images = np.random.default_rng(0).normal(size=(9, 16, 16, 3))
    init = jax.jit(functools.partial(network(small()).init, train=False))
    frozen = init(jax.random.key(0), jnp.float32(images))["frozen"]
    # Not compared with filters computed here: the eigenvalues of noise are
    # close to each other, so that rounding rotates the eigenvectors.
    moments = filtered_moments(images, frozen["whitening"]["kernel"])
    # Variances are about 1, and epsilon is 5e-4.
    np.testing.assert_allclose(moments, np.eye(12), atol=1e-3)


def test_small_images_are_enlarged():
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1))
    got = np.asarray(enlarge(jnp.float32(images)))
    assert got.shape == (2, 32, 32, 1)
    np.testing.assert_array_equal(got[:, ::4, 1::4], np.float32(images))
    assert enlarge(got) is got


def test_more_blocks_than_an_image_can_be_halved():
    check_widths((8,) * 4, (1, 32, 32, 3))
    with pytest.raises(UserError, match="32 pixels allow at most 4"):
        check_widths((8,) * 5, (1, 32, 32, 3))
