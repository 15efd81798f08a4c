"""The inference formula."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import jaxbn

pytestmark = [pytest.mark.optimized, pytest.mark.sample(2)]


class NormalizeTest(parameterized.TestCase):
    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_matches_float64(self, dtype):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(6, 4, 3)), dtype)
        mean, scale, bias = rng.normal(size=(3, 4)).astype(np.float32)
        var = rng.random(4).astype(np.float32)
        got = jaxbn.normalize(x, mean, var, scale, bias, feature_axis=1)
        wide = np.asarray(x, np.float64)
        mean, var, scale, bias = (
            a.astype(np.float64)[:, None] for a in (mean, var, scale, bias)
        )
        want = (wide - mean) / np.sqrt(var + 1e-5) * scale + bias
        chex.assert_type(got, dtype)
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance
        )

    @parameterized.parameters("mean", "var", "scale", "bias")
    def test_wrong_length_is_named(self, name):
        good = dict.fromkeys(("mean", "var", "scale", "bias"), np.ones(3))
        with pytest.raises(ValueError, match=f"^{name} must have shape"):
            jaxbn.normalize(np.ones((4, 3)), **(good | {name: np.ones(2)}))
