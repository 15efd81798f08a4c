"""Derivatives of batch_norm, of every order and mode."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads

import jaxbn

pytestmark = [pytest.mark.optimized, pytest.mark.sample(2)]

EPSILON = 1e-5


class DerivativeTest(parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_all_orders_and_modes(self, masked):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            x, cotangent = rng.normal(size=(2, 7, 2))
            scale, bias = rng.normal(size=(2, 2))
            where = jnp.asarray(rng.random((7, 1)) < 0.6) if masked else None

            def outputs(x, scale, bias):
                y, batch = jaxbn.batch_norm(x, scale, bias, where=where)
                return jnp.sin(y) * cotangent, batch.mean, batch.var

            check_grads(
                jax.jit(outputs),
                (x, scale, bias),
                order=2,
                modes=("fwd", "rev"),
            )

    def test_equals_autodiff_of_the_formula_to_third_order(self):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            x, direction, cotangent = rng.normal(size=(3, 6, 2))

            def plain(x):
                centred = x - x.mean(0)
                y = centred / jnp.sqrt(jnp.square(centred).mean(0) + EPSILON)
                return (jnp.tanh(y) * cotangent).sum()

            def ours(x):
                y, _ = jaxbn.standardize(x, epsilon=EPSILON)
                return (jnp.tanh(y) * cotangent).sum()

            def third(f):
                hvp = jax.grad(lambda x: jax.jvp(f, (x,), (direction,))[1])
                return jax.jit(lambda x: jax.jvp(hvp, (x,), (direction,)))(x)

            chex.assert_trees_all_close(third(ours), third(plain), rtol=1e-9)

    def test_backward_keeps_only_x_and_vectors(self):
        x = jnp.ones((64, 8), jnp.bfloat16)
        scale, bias = jnp.ones(8), jnp.zeros(8)
        _, backward = jax.vjp(
            lambda *a: jaxbn.batch_norm(*a)[0], x, scale, bias
        )
        saved = [a for a in jax.tree.leaves(backward) if a.size >= x.size]
        assert [a.dtype for a in saved] == [jnp.bfloat16]
