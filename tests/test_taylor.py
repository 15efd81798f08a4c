"""Taylor series through training, by `jax.experimental.jet`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet

import jaxbn
from tests.helpers.layers import linen_layer

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]

WRAPPERS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "relu before": lambda f: lambda x: f(jax.nn.relu(x)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("offset", (0.0, 30.0))
def test_derivatives_of_a_line(wrapper, offset):
    """offset: 30 standard deviations take the second pass."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, v = jnp.asarray(rng.normal(size=(2, 8, 3)))
        module = linen_layer()
        variables = module.init(jax.random.key(0), x)

        def f(x):
            y, _ = module.apply(variables, x, mutable=["batch_stats"])
            return jnp.square(y)

        f = WRAPPERS[wrapper](f)
        zero = jnp.zeros_like(v)
        y, terms = jet(f, (x + offset,), ((v, zero, zero),))

        def line(t):
            return f(x + offset + t * v)

        for got in (y, *terms):
            np.testing.assert_allclose(got, line(0.0), rtol=1e-8, atol=1e-8)
            line = jax.jacfwd(line)


def test_ids_groups_and_masks():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    scope = jaxbn.Scope(num_ids=2, normalize_over=4)

    def f(x):
        ids = jnp.arange(8) % 2
        return jaxbn.batch_norm(x, ids=ids, where=x > -1, sharing=scope)[0]

    _, (first, _) = jet(f, (x,), ((jnp.ones_like(x), jnp.zeros_like(x)),))
    _, want = jax.jvp(f, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(first, want, atol=1e-5)
