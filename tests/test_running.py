import chex
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import Moments, RunningStats


def test_one_and_ten_steps_match_the_recurrence():
    rng = np.random.default_rng(0)
    batches = rng.normal(2, 3, (10, 16, 4)).astype(np.float32)
    got = jaxbn.init_running(4)
    mean, var = np.zeros(4), np.ones(4)
    for x in batches:
        got = jaxbn.update_running(got, jaxbn.moments(x), decay=0.9)
        mean = 0.9 * mean + 0.1 * x.astype(np.float64).mean(0)
        var = 0.9 * var + 0.1 * x.astype(np.float64).var(0)
        chex.assert_trees_all_close(got, RunningStats(mean, var), rtol=1e-5)


def test_ddof_stores_the_unbiased_variance():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    got = jaxbn.update_running(
        jaxbn.init_running(3), jaxbn.moments(x), decay=0.0, ddof=1
    )
    chex.assert_trees_all_close(got.var, x.var(0, ddof=1), rtol=1e-5)


def test_empty_features_keep_their_statistics():
    old = RunningStats(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    batch = Moments(jnp.array([0.0, 2.0]), jnp.zeros(2), jnp.ones(2))
    got = jaxbn.update_running(old, batch, decay=0.5)
    chex.assert_trees_all_close(
        got, RunningStats(np.array([1.0, 1.0]), np.array([3.0, 2.25]))
    )


def test_no_gradient_and_no_narrow_types():
    def total(x):
        new = jaxbn.update_running(
            jaxbn.init_running(3, dtype=x.dtype), jaxbn.moments(x), decay=0.9
        )
        chex.assert_type(jax.tree.leaves(new), jnp.float32)
        return new.mean.sum() + new.var.sum()

    x = jnp.arange(12.0, dtype=jnp.bfloat16).reshape(4, 3)
    chex.assert_trees_all_equal(jax.grad(total)(x), jnp.zeros_like(x))


def test_nonfinite_batches_are_skipped_if_asked():
    old = jaxbn.init_running(2)
    bad = Moments(jnp.float32(3), jnp.array([0.0, jnp.nan]), jnp.ones(2))
    inf = Moments(jnp.float32(3), jnp.zeros(2), jnp.array([jnp.inf, 0]))
    good = Moments(jnp.float32(3), jnp.ones(2), jnp.ones(2))
    for batch, finite in ((bad, False), (inf, False), (good, True)):
        assert bool(jaxbn.is_finite(batch)) == finite
        new = jaxbn.update_running(old, batch, decay=0.5, skip_nonfinite=True)
        kept = bool((new.mean == old.mean).all() & (new.var == old.var).all())
        assert kept != finite
    poisoned = jaxbn.update_running(old, bad, decay=0.5)
    assert np.isnan(poisoned.mean[1])


def test_narrow_old_statistics_are_widened_first():
    old = RunningStats(
        jnp.full(1, 1.0, jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    )
    batch = Moments(jnp.float32(2), jnp.ones(1), jnp.ones(1))
    got = jaxbn.update_running(old, batch, decay=0.99)
    # In bfloat16 0.99 * 1 is 0.98828125.
    np.testing.assert_allclose(got.mean, 1.0, rtol=1e-6)
