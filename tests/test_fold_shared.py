"""Kernels that serve several layers, and state that is no batch norm's."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn.fold import fold
from tests.helpers.folding import (
    Dictated,
    assert_close,
    assert_no_norm_is_left,
    initialized,
    norm,
    normal,
)

pytestmark = pytest.mark.sample(2)


def siamese(pair):
    conv, conv_norm = nn.Conv(5, (3, 3)), norm("conv_norm")
    layer, layer_norm = nn.Dense(4), norm("layer_norm")

    def embed(x):
        x = nn.relu(conv_norm(conv(x))).mean((1, 2))
        return layer_norm(layer(x))

    a, b = pair
    return jnp.concatenate([embed(a), embed(b)])


def head_on_levels(x):
    """Two convolutions on a pyramid of images, as detectors have them."""
    convs = [nn.Conv(4, (3, 3), use_bias=False) for _ in range(2)]
    norms = [norm(f"norm{i}") for i in range(2)]
    found = []
    for level in (x, x[:, ::2, ::2], x[:, ::4, ::4, :]):
        for conv, module in zip(convs, norms):
            level = nn.relu(module(conv(level)))
        found.append(level.mean((1, 2)))
    return sum(found)


def on_ranks(x):
    """One layer on sequences and on their means."""
    layer, module = nn.Dense(3, name="layer"), norm()
    return module(layer(x)).mean(1) + module(layer(x.mean(1)))


def in_a_chain(x):
    layer, module = nn.Dense(3, name="layer"), norm()
    return module(layer(nn.relu(module(layer(x)))))


@pytest.mark.parametrize(
    "call, shapes, norms, products, joins",
    [
        (siamese, [(2, 6, 6, 3), (2, 8, 5, 3)], 2, 4, 0),
        (head_on_levels, (2, 8, 8, 4), 2, 6, 3),
        (on_ranks, (2, 5, 4), 1, 2, 1),
        (in_a_chain, (4, 3), 1, 2, 0),
    ],
    ids=["siamese", "head", "ranks", "chain"],
)
def test_one_kernel_serves_all(call, shapes, norms, products, joins):
    several = isinstance(shapes, list)
    x = tuple(normal(*s) for s in shapes) if several else normal(*shapes)
    model = Dictated(call)
    variables = initialized(model, x)
    folded = fold(model.apply, variables, x)
    assert len(folded.layers) == norms
    assert sorted(folded.params) == sorted(
        f"{layer.kernel.rpartition('/')[0]}/{name}"
        for layer in folded.layers
        for name in ("bias", "kernel")
    )
    assert_close(folded.apply(folded.params, x), model.apply(variables, x))
    more = jax.tree.map(lambda a: np.concatenate([a, a + 1]), x)
    assert_close(
        folded.apply(folded.params, more), model.apply(variables, more)
    )
    assert_no_norm_is_left(folded, x, products=products, joins=joins)


def norms_of_their_own(x):
    layer = nn.Dense(3, name="layer")
    return norm("a")(layer(x)) + norm("b")(layer(2 * x))


def once_without(x):
    layer = nn.Dense(3, name="layer")
    return norm("a")(layer(x)) + layer(2 * x)


def once_reversed(x):
    layer, module = nn.Dense(3, name="layer"), norm("a")
    return module(layer(x)) + module(layer(x)[:, ::-1])


@pytest.mark.parametrize(
    "call", [norms_of_their_own, once_without, once_reversed]
)
def test_different_normalizations_of_one_kernel_are_refused(call):
    # At their initial values the normalizations do the same.
    model, x = Dictated(call), normal(4, 3)
    variables = model.init(jax.random.key(0), x)
    message = (
        "'a' follows a layer whose kernel 'params/layer/kernel' is also used "
        "elsewhere: it goes into `dot_general` and `dot_general`. One kernel "
        "folds only if the same normalization follows every use"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fold(model.apply, variables, x)


def test_kernel_used_transposed_is_refused():
    def apply(v, x):
        def normalize(y):
            return (y - v["mean"]) * jax.lax.rsqrt(v["var"])

        return normalize(x @ v["kernel"]) + normalize(x @ v["kernel"].T)

    v = dict(kernel=normal(3, 3), mean=normal(3), var=np.float32([1, 2, 3]))
    with pytest.raises(ValueError, match="also used elsewhere"):
        fold(apply, v, normal(4, 3))


def test_features_of_one_kernel_are_told_apart():
    """The same mean and variance, in the order of rows and of columns."""

    def apply(v, x):
        slope = jax.lax.rsqrt(v["var"])

        def layer():
            return jnp.einsum("ni,iab->nab", x, v["kernel"])

        return (layer() - v["mean"]) * slope + (
            (layer() - v["mean"].T) * slope.T
        )

    rng = np.random.default_rng(0)
    v = dict(kernel=normal(4, 3, 3), mean=normal(3, 3))
    v["var"] = rng.uniform(1, 2, (3, 3)).astype(np.float32)
    x = normal(5, 4)
    folded = fold(apply, v, x, on_unfoldable="keep")
    assert not any(layer.kernel for layer in folded.layers)
    assert_close(folded.apply(folded.params, x), apply(v, x))


def test_what_only_lies_in_batch_stats_is_no_normalization():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("batch_stats", "step", lambda: jnp.zeros((), int))
            gain = self.variable("batch_stats", "gain", jnp.ones, ())
            layer = nn.SpectralNorm(nn.Conv(5, (3, 3)), name="spectral")
            x = nn.relu(layer(gain.value * x, update_stats=False))
            u, v = (
                self.variable("batch_stats", f"own/{name}", jnp.ones, 5)
                for name in ("u", "v")
            )
            kernel = self.param("kernel", nn.initializers.ones, (5, 5))
            x = nn.relu(x @ (kernel / (u.value @ kernel @ v.value)))
            x = nn.Conv(4, (3, 3), name="conv")(x)
            return norm()(x)

    model, x = Net(), normal(2, 6, 6, 3)
    variables = initialized(model, x)
    variables["batch_stats"]["counter"] = {"count": jnp.ones(())}
    folded = fold(model.apply, variables, x)
    assert folded.layers == (("norm", "params/conv/kernel", "conv", None),)
    assert_close(folded.apply(folded.params, x), model.apply(variables, x))


def test_spectral_norm_itself_is_a_computed_kernel():
    def call(x):
        layer = nn.SpectralNorm(nn.Dense(3, name="layer"))
        return norm()(layer(x, update_stats=False))

    model, x = Dictated(call), normal(4, 3)
    with pytest.raises(ValueError) as info:
        fold(model.apply, initialized(model, x), x)
    assert str(info.value).startswith("1 of 1 normalizations cannot be folded")
    assert "whose kernel is computed (`" in str(info.value)
