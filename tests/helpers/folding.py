"""Models and assertions of the tests of folding."""

import collections
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.test_util
import numpy as np

from jaxbn.linen import BatchNorm

NORMS = {"jaxbn": BatchNorm, "flax": nn.BatchNorm}
EPSILON = 1e-3


def randomized(shapes, seed=0):
    """Trained-looking values: scales of both signs and zero, large means."""
    rng = np.random.default_rng(seed)
    draw = {
        "mean": lambda n: rng.normal(0, 3, n),
        "var": lambda n: rng.uniform(0.3, 4, n),
        "scale": lambda n: rng.normal(0, 1, n) * (np.arange(n[-1]) != 1),
        "bias": lambda n: rng.normal(0, 1, n),
        "kernel": lambda n: rng.normal(0, np.prod(n[:-1]) ** -0.5, n),
    }

    def one(path, leaf):
        names = [getattr(k, "key", getattr(k, "name", k)) for k in path]
        known = [*(name for name in draw if name in names), "bias"]
        return jnp.asarray(draw[known[0]](leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def normal(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def initialized(model, *inputs, **options):
    # Shapes are enough; the generators of a whole model take long to compile.
    init = functools.partial(model.init, **options)
    return randomized(jax.eval_shape(init, jax.random.key(0), *inputs))


def primitives(closed):
    """How often each primitive occurs, in every body."""
    count = collections.Counter()
    pending = [closed.jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            count[eqn.primitive.name] += 1
            pending.extend(jax.extend.core.jaxprs_in_params(eqn.params))
    return count


def assert_no_norm_is_left(folded, x, *, products, joins):
    """One bias for each product; joins are additions of two data values."""
    assert all(layer.kernel for layer in folded.layers), folded.layers
    for name in folded.params:
        assert "batch_stats" not in name, name
        assert name.rpartition("/")[2] in ("kernel", "bias"), name
    program = jax.make_jaxpr(folded.apply)(folded.params, x)
    count = primitives(program)
    found = count["conv_general_dilated"] + count["dot_general"]
    assert found == products
    assert count["add"] == products + joins
    for name in ("rsqrt", "sqrt", "mul", "sub", "square"):
        assert not count[name], name
    assert not program.consts


def assert_close(got, want, rtol=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        got, want, rtol=0, atol=rtol * np.abs(want).max()
    )


class Pair(nn.Module):
    """A layer and its normalization."""

    layer: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        return self.norm(name="norm")(self.layer(name="layer")(x))


class Dictated(nn.Module):
    """A model that is one function."""

    call: Any

    @nn.compact
    def __call__(self, x):
        return self.call(x)


def norm(name="norm", **options):
    return nn.BatchNorm(use_running_average=True, name=name, **options)


def dense(x, name="layer"):
    return nn.Dense(3, name=name)(x)
