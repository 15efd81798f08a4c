"""Layers and functions exported with symbolic shapes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.nnx
from jaxbn import Scope
from jaxbn.linen import BatchNorm

pytestmark = pytest.mark.sample(2)

N, C = 16, 6
IDS = np.arange(N) % 2


def draw(*shape, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(offset, 1, shape or (N, C)).astype(np.float32)


X = draw()


def train(module, variables, x, **call):
    return module.apply(variables, x, mutable=["batch_stats"], **call)


def exported(fn, *args, sizes):
    """fn exported with symbolic sizes and called with args."""
    specs = jax.export.symbolic_args_specs(args, sizes)
    return jax.export.export(jax.jit(fn))(*specs).call(*args)


class TestSymbolicShapes:
    def check(self, fn, *args, sizes):
        chex.assert_trees_all_close(
            exported(fn, *args, sizes=sizes), fn(*args), atol=1e-5
        )

    def test_layers(self):
        ours = BatchNorm(use_running_average=False)
        v = ours.init(jax.random.key(0), X[:1])
        mask = ("b, 6", "b, 1")
        self.check(lambda x: train(ours, v, x), X, sizes="b, 6")
        self.check(
            lambda x, m: train(ours, v, x, mask=m), X, X[:, :1] > 0, sizes=mask
        )
        self.check(
            jax.grad(lambda x: (train(ours, v, x)[0] ** 3).sum()),
            X,
            sizes="b, 6",
        )

        def make():
            return jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))

        self.check(lambda x: make()(x), X, sizes="b, 6")

    def test_images(self):
        x = X.reshape(4, 2, 2, C)
        size = "b, h, w, 6"
        self.check(lambda x: jaxbn.batch_norm(x)[0], x, sizes=size)
        adapt = BatchNorm(True, inference=jaxbn.Prior(4.0))
        v = adapt.init(jax.random.key(0), x)
        self.check(lambda x: adapt.apply(v, x), x, sizes=size)
        weighted = functools.partial(
            jaxbn.normalize_weighted,
            mean=jnp.zeros(C),
            var=jnp.ones(C),
            weight=0.1,
        )
        self.check(weighted, x, sizes=size)

    def test_ids_and_ghost_batches(self):
        def run(scope, x, ids=None):
            return jaxbn.batch_norm(x, ids=ids, sharing=scope)

        by_id = functools.partial(run, Scope(num_ids=2))
        self.check(by_id, X, IDS, sizes=("b, 6", "b"))
        ghost = functools.partial(run, Scope(normalize_over=4))
        self.check(ghost, X, sizes="4*b, 6")
        with pytest.raises(
            ValueError, match="must divide the b examples per device"
        ):
            exported(ghost, X, sizes="b, 6")
