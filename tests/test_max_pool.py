"""The maximum over windows of 2x2: its value and where its derivative goes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from train.max_pool import max_pool

flax_max_pool = functools.partial(
    nn.max_pool, window_shape=(2, 2), strides=(2, 2)
)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 2)])
def test_value_and_gradient_are_those_of_flax(size):
    rng = np.random.default_rng(0)
    # Few levels, so that many windows hold their maximum more than once.
    x = jnp.asarray(rng.integers(-2, 3, (4, *size, 3)), jnp.float32)
    want, pull_flax = jax.vjp(flax_max_pool, x)
    got, pull = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(got, want)
    cotangent = jnp.asarray(rng.normal(size=got.shape), jnp.float32)
    np.testing.assert_array_equal(pull(cotangent)[0], pull_flax(cotangent)[0])


def test_derivatives_of_both_modes():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).permutation(2 * 5 * 4 * 3) / 7
        check_grads(
            max_pool, (x.reshape(2, 5, 4, 3),), 1, ("fwd", "rev"), 1e-6, 1e-6
        )


def test_no_scatter_is_left():
    x = jnp.zeros((2, 4, 4, 1))
    text = jax.jit(jax.grad(lambda x: max_pool(x).sum())).lower(x).as_text()
    assert "select_and_scatter" not in text
