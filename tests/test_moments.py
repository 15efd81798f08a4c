"""Moments of a batch, merged and synchronized, against float64."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import jaxbn
from jaxbn import Moments

pytestmark = [pytest.mark.optimized, pytest.mark.sample(2)]


def draw(shape, *, offset=0.0, dtype=np.float32):
    return np.random.default_rng(0).normal(offset, 1, shape).astype(dtype)


def expected(x, keep):
    x, keep = x.astype(np.float64), np.broadcast_to(keep, x.shape)
    axes, n = tuple(range(x.ndim - 1)), keep.sum(tuple(range(x.ndim - 1)))
    return Moments(n, x.mean(axes, where=keep), n * x.var(axes, where=keep))


class MomentsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.0, 1e2, 1e3, 1e4)
    def test_matches_float64(self, offset):
        x = draw((64, 9, 3), offset=offset)
        keep = np.random.default_rng(1).random(x.shape) < 0.7
        want = expected(x, keep)
        poisoned = jnp.where(keep, x, jnp.nan)
        got = self.variant(jaxbn.moments)(poisoned, where=keep)
        chex.assert_trees_all_close(got, want, rtol=1e-5)

    @parameterized.parameters(jnp.float16, jnp.bfloat16)
    def test_narrow_inputs_are_summed_in_float32(self, dtype):
        x = jnp.asarray(draw((512, 4), offset=8.0), dtype)
        got = jaxbn.moments(x)
        chex.assert_type(jax.tree.leaves(got), jnp.float32)
        want = expected(np.asarray(x, np.float32), True)
        chex.assert_trees_all_close(got.m2, want.m2, rtol=1e-5)

    def test_counts_are_per_feature_only_where_the_mask_is(self):
        x = draw((6, 5, 3))
        rows = np.arange(6)[:, None, None] < 4
        chex.assert_trees_all_equal(
            [
                jaxbn.moments(x).count,
                jaxbn.moments(x, where=rows).count,
                jaxbn.moments(x, where=rows & (np.arange(3) != 1)).count,
            ],
            [
                np.float32(30),
                np.float32(20),
                np.array([20, 0, 20], np.float32),
            ],
        )

    def test_nothing_kept_is_three_zeros(self):
        x = jnp.full((4, 3), jnp.nan)
        got = jaxbn.moments(x, where=jnp.zeros((4, 1), bool))
        chex.assert_trees_all_equal(got, Moments(0.0, np.zeros(3), np.zeros(3)))

    @parameterized.parameters(
        dict(feature_axis=1, axes=(0, 2)), dict(feature_axis=(0, -1), axes=(1,))
    )
    def test_feature_axes(self, feature_axis, axes):
        x = draw((4, 5, 6))
        got = jaxbn.moments(x, feature_axis=feature_axis)
        want = x.astype(np.float64).var(axes)
        chex.assert_trees_all_close(got.var, want, rtol=1e-5)

    def test_merge_equals_the_whole(self):
        x = draw((70, 3), offset=1e3)
        cuts = np.cumsum([0, 1, 2, 2, 0, 20, 45])
        parts = [jaxbn.moments(x[a:b]) for a, b in zip(cuts, cuts[1:])]
        parts.append(jaxbn.moments(x, where=np.zeros((70, 1), bool)))
        want = expected(x, True)._replace(count=np.float64(70))
        chex.assert_trees_all_close(jaxbn.merge(*parts), want, rtol=1e-5)

    def test_merge_of_equal_means_is_exact(self):
        mean = jnp.float32([0.1, 1e4 / 3])
        parts = [Moments(jnp.float32(n), mean, mean) for n in (3, 7, 9)]
        got = jaxbn.merge(*parts)
        chex.assert_trees_all_equal(got.mean, mean)
        chex.assert_trees_all_equal(got.m2, mean + mean + mean)

    def test_rounding_of_the_first_pass_is_taken_back(self):
        # Sums of these reach 4e10, in float32 steps of 4096.
        x = draw((4_000_000, 1), offset=1e4)
        got, want = jax.jit(jaxbn.moments)(x), expected(x, True)
        np.testing.assert_allclose(got.mean, want.mean, rtol=2e-7)
        np.testing.assert_allclose(got.m2, want.m2, rtol=1e-5)

    def test_sums_beyond_the_largest_float(self):
        x = jnp.full((1000, 1), 3e38, jnp.float32)
        got = jaxbn.moments(x)
        assert jnp.isfinite(got.mean).all() and jnp.isinf(got.m2).all()
        poisoned = jaxbn.moments(x.at[0].set(jnp.nan))
        assert jnp.isnan(poisoned.mean).all() and jnp.isnan(poisoned.m2).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(x=np.ones((4, 3), np.int32)),
            "x must be floating or complex; got int32[4, 3]",
        ),
        (
            dict(x=np.ones((4, 2, 2, 3)), where=np.ones(4, bool)),
            "where[:, None, None, None]",
        ),
        (
            dict(x=np.ones((3, 3)), where=np.ones(3, bool)),
            "where[:, None], and one over the last axis as where[None, :]",
        ),
        (
            dict(x=np.ones((4, 3)), where=np.ones((2, 3), bool)),
            "where must broadcast to x; got where bool[2, 3]",
        ),
        (
            dict(x=np.ones((4, 3)), where=np.ones((4, 1))),
            "where must be bool; got float32[4, 1]",
        ),
        (
            dict(x=np.ones((4, 3)), feature_axis=2),
            "feature_axis=2 is not an axis of x, which is float32[4, 3]",
        ),
    ],
)
def test_bad_input_says_what_arrived(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxbn.moments(arguments.pop("x"), **arguments)


def test_merge_of_nothing():
    with pytest.raises(ValueError, match="at least one"):
        jaxbn.merge()
