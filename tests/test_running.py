"""Running statistics against recurrences and sums in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Moments, RunningStats

pytestmark = [pytest.mark.optimized, pytest.mark.sample(2)]


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


@pytest.mark.parametrize("count", (2, 5))
def test_ddof_stores_the_unbiased_variance(count):
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
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


def weights_by_hand(decay, steps):
    """The weights of Adam's bias correction, in float64."""
    weights = (1 - decay) * decay ** np.arange(steps)[::-1]
    return weights / weights.sum()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.999999, None])
@pytest.mark.parametrize("start", [0.0, 1.0, 1e3])
def test_debiased_whatever_the_start(decay, start):
    rng = np.random.default_rng(0)
    batches = rng.normal(2, 3, (20, 16, 4)).astype(np.float32)
    got = jaxbn.init_running(4, count_steps=True)
    got = got._replace(mean=got.mean + start, var=got.var * start)
    update = jax.jit(
        functools.partial(
            jaxbn.update_running, decay=decay, debias=decay is not None
        )
    )
    for x in batches:
        got = update(got, jaxbn.moments(x))
    weights = np.ones(20) / 20 if decay is None else weights_by_hand(decay, 20)
    wide = batches.astype(np.float64)
    chex.assert_trees_all_close(
        got,
        RunningStats(
            weights @ wide.mean(1), weights @ wide.var(1), np.full(4, 20)
        ),
        rtol=1e-5,
    )


def test_a_traced_decay_is_debiased_too():
    old = jaxbn.init_running(2, count_steps=True)
    batch = Moments(jnp.float32(2), jnp.full(2, 3.0), jnp.full(2, 8.0))
    update = jax.jit(
        lambda old, decay: jaxbn.update_running(
            old, batch, decay=decay, debias=True
        )
    )
    for steps in (1, 2):
        old = update(old, 0.9)
        want = RunningStats(np.full(2, 3.0), np.full(2, 4.0), np.full(2, steps))
        chex.assert_trees_all_close(old, want, rtol=1e-6)


def test_steps_count_only_what_entered():
    old = jaxbn.init_running(3, count_steps=True)
    count = jnp.array([0.0, 1.0, 5.0])
    batch = Moments(count, jnp.full(3, 2.0), jnp.zeros(3))
    new = jaxbn.update_running(old, batch, decay=None, ddof=1)
    chex.assert_trees_all_equal(new.steps, np.array([0, 0, 1]))
    chex.assert_trees_all_equal(new.mean, np.array([0.0, 0.0, 2.0]))
    bad = batch._replace(mean=batch.mean.at[2].set(jnp.nan))
    new = jaxbn.update_running(old, bad, decay=None, skip_nonfinite=True)
    chex.assert_trees_all_equal(new.steps, np.zeros(3))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decay=None), "decay=None needs the number of batches so far"),
        (dict(decay=0.9, debias=True), "debias=True needs the number of"),
    ],
)
def test_averages_need_a_count_of_steps(options, message):
    batch = jaxbn.moments(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=message):
        jaxbn.update_running(jaxbn.init_running(2), batch, **options)


def test_debias_needs_a_decay_below_one():
    old = jaxbn.init_running(2, count_steps=True)
    batch = jaxbn.moments(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="needs decay < 1; got 1.0"):
        jaxbn.update_running(old, batch, decay=1.0, debias=True)


class TestAdapt:
    def test_is_the_formula_of_the_paper(self):
        running = RunningStats(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
        batch = Moments(
            jnp.float32(6), jnp.array([5.0, 0.0]), jnp.full(2, 12.0)
        )
        got = jaxbn.adapt(running, batch, prior=18)
        want = 0.75 * np.array([[1, 2], [3, 4]]) + 0.25 * np.array(
            [[5, 0], [2, 2]]
        )
        chex.assert_trees_all_close(got[:2], tuple(want), rtol=1e-6)

    def test_ends_of_the_prior(self):
        running = jaxbn.init_running(2)
        batch = Moments(jnp.float32(6), jnp.full(2, 5.0), jnp.full(2, 12.0))
        none = jaxbn.adapt(running, batch, prior=0)
        chex.assert_trees_all_equal(none.mean, batch.mean)
        chex.assert_trees_all_equal(none.var, batch.var)
        for prior in (np.inf, jnp.inf):
            same = jaxbn.adapt(running, batch, prior=prior)
            chex.assert_trees_all_equal(same, running)

    def test_a_batch_without_values_changes_nothing(self):
        running = jaxbn.init_running(2)
        empty = Moments(jnp.float32(0), jnp.zeros(2), jnp.zeros(2))
        for prior in (0, 3.0):
            same = jaxbn.adapt(running, empty, prior=prior)
            chex.assert_trees_all_equal(same, running)

    def test_a_negative_prior(self):
        batch = jaxbn.moments(jnp.ones((4, 2)))
        with pytest.raises(ValueError, match="at least 0; got -1"):
            jaxbn.adapt(jaxbn.init_running(2), batch, prior=-1)


class TestPool:
    def test_replicas_of_a_whole_tree_have_the_statistics_of_their_data(self):
        """The law of total variance is exact for parts that are disjoint."""
        rng = np.random.default_rng(0)
        x = rng.normal([[[0.0]], [[5.0]], [[9.0]]], 2, (3, 50, 4))
        counts = [50, 20, 35]
        parts = [part[:n] for part, n in zip(x, counts)]
        stats = {
            "bn": {
                "mean": jnp.stack([jnp.float32(p.mean(0)) for p in parts]),
                "var": jnp.stack([jnp.float32(p.var(0)) for p in parts]),
                "skipped": jnp.array([0, 2, 1]),
            },
            "plain": [RunningStats(jnp.float32(x.mean(1)), jnp.ones((3, 4)))],
        }
        got = jaxbn.pool(stats, counts=jnp.array(counts))
        together = np.concatenate(parts)
        want = {"mean": together.mean(0), "var": together.var(0), "skipped": 2}
        chex.assert_trees_all_close(got["bn"], want, rtol=1e-5)
        got = jaxbn.pool(stats)["plain"][0]
        want = 1 + x.mean(1).var(0)
        chex.assert_trees_all_close(got.var, want, rtol=1e-5)
        assert got.steps is None

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("check_vma", [False, True])
    def test_over_devices(self, weighted, check_vma):
        rng = np.random.default_rng(0)
        mean = rng.normal(1e3, 2, (8, 3)).astype(np.float32)
        var = rng.uniform(1, 4, (8, 3)).astype(np.float32)
        counts = np.arange(8, dtype=np.float32)  # the first saw nothing
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        def pooled(mean, var, count):
            stats = {
                "bn": {"mean": mean[0], "var": var[0], "skipped": count[0]}
            }
            count = count[0] if weighted else None
            return jaxbn.pool(stats, axis_name="data", counts=count)

        mapped = jax.jit(
            jax.shard_map(
                pooled,
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P(),
                check_vma=check_vma,
            )
        )
        got = mapped(mean, var, counts)["bn"]
        w = (counts if weighted else np.ones(8)).astype(np.float64)
        w = w[:, None] / w.sum()
        center = (w * mean).sum(0)
        want = (w * (var + (mean - center) ** 2)).sum(0)
        chex.assert_trees_all_close(got["mean"], center, rtol=1e-6)
        chex.assert_trees_all_close(got["var"], want, rtol=1e-4)
        assert got["skipped"] == 7

    @pytest.mark.parametrize("over_devices", [False, True])
    def test_what_is_no_batch_norm_is_that_of_the_first(self, over_devices):
        rng = np.random.default_rng(0)

        def draw(*shape):
            return rng.normal(2, 1, (8, *shape)).astype(np.float32)

        tree = {
            "bn": {"mean": draw(3), "var": 1 + draw(3) ** 2},
            "spectral": {"kernel/u": draw(1, 4), "kernel/sigma": draw()},
            # Of an observation normalizer, whose counts weigh them.
            "seen": {"mean": draw(2), "var": draw(2), "count": draw()},
            "shapes": {"mean": draw(2), "var": draw(1)},
            "flag": np.arange(8) > 3,
            "steps": np.arange(8, dtype=np.int8) + 3,
        }
        if over_devices:
            mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
            pooled = jax.shard_map(
                lambda tree: jaxbn.pool(
                    jax.tree.map(lambda a: a[0], tree), axis_name="data"
                ),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P(),
            )
            got = jax.jit(pooled)(tree)
        else:
            got = jaxbn.pool(tree)
        layer, own = tree.pop("bn"), got.pop("bn")
        want = layer["var"].mean(0) + layer["mean"].var(0)
        chex.assert_trees_all_close(own["var"], want, rtol=1e-5)
        chex.assert_trees_all_equal(got, jax.tree.map(lambda a: a[0], tree))
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype, got, tree)
        assert all(jax.tree.leaves(same))

    def test_what_cannot_be_pooled(self):
        stats = {"mean": jnp.zeros((2, 3)), "var": jnp.zeros((3, 3))}
        with pytest.raises(ValueError, match="stacked on axis 0 of every leaf"):
            jaxbn.pool(stats)
        with pytest.raises(ValueError, match=r"counts \(3,\)"):
            jaxbn.pool(stats | {"var": stats["mean"]}, counts=jnp.ones(3))
        with pytest.raises(ValueError, match="is not bound here, so there is"):
            jaxbn.pool(stats, axis_name="data")
