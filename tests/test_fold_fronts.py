"""Normalizations that the layer behind them takes in."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn.fold import fold
from tests.helpers.folding import (
    EPSILON,
    Dictated,
    assert_close,
    assert_no_norm_is_left,
    dense,
    initialized,
    norm,
    normal,
)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_dense_matches_float64(use_bias, stored):
    def call(x):
        layer = nn.Dense(5, use_bias, param_dtype=stored, name="layer")
        return layer(norm(epsilon=EPSILON)(x))

    model, x = Dictated(call), normal(7, 4)
    variables = initialized(model, x)
    folded = fold(model.apply, variables, x)
    assert folded.layers == (("norm", "params/layer/kernel", "dense", None),)
    assert_no_norm_is_left(folded, x, products=1, joins=0)

    def wide(tree):
        return {k: np.asarray(a, np.float64) for k, a in tree.items()}

    layer, own = (wide(variables["params"][n]) for n in ("layer", "norm"))
    stats = wide(variables["batch_stats"]["norm"])
    slope = own["scale"] / np.sqrt(stats["var"] + EPSILON)
    offset = own["bias"] - stats["mean"] * slope
    bias = offset @ layer["kernel"] + layer.get("bias", 0.0)
    digits = 1e-6 if stored == jnp.float32 else 4e-3
    kernel = folded.params["params/layer/kernel"]
    assert kernel.dtype == stored
    assert_close(kernel, layer["kernel"] * slope[:, None], digits)
    assert_close(folded.params["params/layer/bias"], bias, 1e-6)


def convolution(x):
    return nn.Conv(5, (3, 2), strides=2, padding="VALID")(norm()(x))


def two_contracted(x):
    return nn.DenseGeneral((2, 3), axis=(-2, -1))(norm()(x))


def features_of_both(x):
    return nn.DenseGeneral(3, axis=(-2, -1))(norm(axis=(-2, -1))(x))


def two_norms(x):
    return dense(norm("b")(norm("a")(x)))


def twins(x):
    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense(norm()(x))

    return nn.vmap(
        Twin,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )(name="twins")(x)


@pytest.mark.parametrize(
    "call, shape, products, norms",
    [
        (convolution, (2, 6, 5, 3), 1, 1),
        (two_contracted, (3, 4, 2), 1, 1),
        (features_of_both, (3, 4, 2), 1, 1),
        (two_norms, (4, 3), 1, 2),
        (twins, (4, 3), 1, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers(call, shape, products, norms):
    model, x = Dictated(call), normal(*shape)
    variables = initialized(model, x)
    folded = fold(model.apply, variables, x)
    assert len(folded.layers) == norms
    assert_no_norm_is_left(folded, x, products=products, joins=0)
    more = normal(7, *shape[1:], seed=3)
    assert_close(
        folded.apply(folded.params, more), model.apply(variables, more)
    )


def test_both_sides_of_one_layer():
    """A critic with a normalization in front of every layer, and one behind."""

    def critic(x):
        x = norm("norm0")(x)
        for i in range(2):
            x = norm(f"norm{i + 1}")(nn.relu(dense(x, f"layer{i}")))
        return norm("last")(dense(x, "layer2"))

    model, x = Dictated(critic), normal(6, 3)
    variables = initialized(model, x)
    folded = fold(model.apply, variables, x)
    assert [layer.kernel for layer in folded.layers] == [
        f"params/layer{i}/kernel" for i in (0, 1, 2, 2)
    ]
    assert_no_norm_is_left(folded, x, products=3, joins=0)
    assert folded.max_difference.relative < 1e-6


def test_layer_in_front_comes_first():
    model = Dictated(lambda x: dense(norm()(dense(x, "first")), "second"))
    x = normal(6, 3)
    folded = fold(model.apply, initialized(model, x), x)
    (layer,) = folded.layers
    assert layer.kernel == "params/first/kernel"


def test_kernel_that_is_also_used_elsewhere_is_left_alone():
    def call(x):
        layer = functools.partial(nn.Dense, 3)(name="layer")
        return layer(norm()(x)) + layer(nn.relu(x))

    model, x = Dictated(call), normal(6, 3)
    with pytest.raises(ValueError, match="normalizes an input"):
        fold(model.apply, initialized(model, x), x)
