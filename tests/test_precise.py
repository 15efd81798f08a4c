"""Statistics recomputed over a data set: exact whatever the batches."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import precise

pytestmark = [pytest.mark.optimized, pytest.mark.sample(2)]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, *, train):
        norm = functools.partial(
            jaxbn.linen.BatchNorm, use_running_average=not train
        )
        x = norm(name="first")(x, mask=mask)
        return norm(name="second")(nn.Dense(4)(nn.relu(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = jaxbn.nnx.BatchNorm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.second = jaxbn.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dense(nnx.relu(self.first(x))))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(3, [1, 5, 0.1], (128, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def net(data):
    model = Net()
    variables = model.init(jax.random.key(0), data, train=False)
    moments = functools.partial(jaxbn.linen.batch_moments, model, train=True)
    return variables, jax.jit(moments)


def split(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize(
    "sizes", [(128,), (64, 64), (2, 2, 4, 8, 16, 32, 64), (64, 32, 16, 8, 8)]
)
def test_any_split_of_the_data_gives_the_statistics_of_all(net, data, sizes):
    variables, moments = net
    got = precise.recompute(moments, variables, split(data, sizes))
    assert got.batches == len(sizes) and not got.converged
    wide = data.astype(np.float64)
    first = got.stats["first"]
    np.testing.assert_array_equal(first.count, np.full(3, 128))
    np.testing.assert_allclose(first.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(first.var, wide.var(0), rtol=1e-6)


def test_uneven_masks_count_by_value(data):
    model = Net()
    rng = np.random.default_rng(1)
    keep = rng.random((128, 1)) < np.linspace(0.1, 0.9, 128)[:, None]
    variables = model.init(jax.random.key(0), data, train=False)

    def moments(variables, batch):
        x, mask = batch
        return jaxbn.linen.batch_moments(model, variables, x, mask, train=True)

    batches = zip(split(data, (96, 32)), split(keep, (96, 32)))
    got = precise.recompute(moments, variables, batches).stats["first"]
    wide = data.astype(np.float64)[keep[:, 0]]
    np.testing.assert_allclose(got.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got.var, wide.var(0), rtol=1e-5)


def test_batch_stats_take_them_and_keep_the_rest(net, data):
    variables, moments = net
    old = variables["batch_stats"]
    old = {**old, "first": {**old["first"], "skipped": jnp.int32(3)}}
    stats = precise.recompute(moments, variables, [data]).stats
    new = precise.with_statistics(old, stats, ddof=1)
    assert new["first"]["skipped"] == 3
    np.testing.assert_allclose(
        new["first"]["var"], data.var(0, ddof=1, dtype=np.float64), rtol=1e-6
    )
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, old)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(
        jnp.result_type, old
    )
    assert not old["first"]["mean"].any()  # the old tree is not changed
    # With them inference computes what training computes on all of the data.
    new = precise.with_statistics(old, stats)
    model = Net()
    y = model.apply({**variables, "batch_stats": new}, data, train=False)
    want, _ = model.apply(variables, data, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, want, atol=1e-4)


def test_a_channel_that_kept_nothing_stays(net, data):
    variables, _ = net
    stats = jaxbn.moments(data, where=np.array([True, False, True]))
    old = {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 9.0)}
    new = precise.with_statistics(old, stats)
    assert new["mean"][1] == 7 and new["var"][1] == 9 and new["mean"][0] != 7


def test_nnx(data):
    model = NnxNet(nnx.Rngs(0))
    model.eval()
    got = precise.recompute(
        jaxbn.nnx.batch_moments, model, split(data, (28, 50, 50))
    )
    assert not model.first.mean[...].any() and model.first.moments is None
    jaxbn.nnx.set_statistics(model, got.stats)
    wide = data.astype(np.float64)
    np.testing.assert_allclose(model.first.mean[...], wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.first.var[...], wide.var(0), rtol=1e-5)
    assert (model.second.var[...] != 1).all()


def test_sharded_arrays_and_shard_map(net, data):
    variables, moments = net
    want = precise.recompute(moments, variables, [data[:64], data[64:]])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(data, NamedSharding(mesh, P("data")))
    got = precise.recompute(moments, variables, [sharded[:64], sharded[64:]])
    # A name that is not bound is what a layer in shard_map would reduce over.
    layer = jaxbn.linen.BatchNorm(axis_name="data", use_running_average=False)
    alone = {
        name: {k: tree[name] for k, tree in variables.items() if name in tree}
        for name in ("first",)
    }["first"]
    mapped = jax.shard_map(
        functools.partial(jaxbn.linen.batch_moments, layer),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    one = precise.recompute(mapped, alone, [data[:64], data[64:]])
    for found in (got.stats["first"], one.stats):
        for a, b in zip(found, want.stats["first"]):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_it_stops_at_the_tolerance_and_the_error_is_what_it_says():
    rng = np.random.default_rng(0)
    batches = rng.normal(100, 2, (2_000, 16, 5)).astype(np.float32)
    moments = lambda _, x: {"a": jaxbn.moments(x)}  # noqa: E731
    read = iter(batches)
    got = precise.recompute(moments, None, read, tolerance=0.02)
    assert got.converged and got.error < 0.02
    assert 10 <= got.batches < 1_000
    assert len(list(read)) == 2_000 - got.batches  # the rest is not read
    # 16 k values: 1 / sqrt(16 k) for the mean, sqrt(2) as much for the
    # variance; the largest of ten estimates of it lies a little above.
    n = 16 * got.batches
    assert 0.9 * np.sqrt(2 / n) < got.error < 1.6 * np.sqrt(2 / n)
    truth = np.abs(got.stats["a"].var / 4 - 1).max()
    assert truth < 4 * got.error
    few = precise.recompute(
        moments, None, iter(batches), tolerance=10.0, min_batches=3
    )
    assert few.batches == 3 and few.converged


def test_equal_batches_have_no_error():
    x = np.random.default_rng(0).normal(1e4, 1, (8, 3)).astype(np.float32)
    got = precise.recompute(lambda _, x: jaxbn.moments(x), None, [x] * 4)
    assert got.error == 0


def test_a_layer_called_twice_has_all_its_moments():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jaxbn.linen.BatchNorm(use_running_average=False, name="bn")
            return norm(x[:8]), norm(x[8:])

    x = np.random.default_rng(0).normal(2, 3, (24, 3)).astype(np.float32)
    model = Twice()
    variables = model.init(jax.random.key(0), x)
    assert set(variables) == {"params", "batch_stats"}
    got = jaxbn.linen.batch_moments(model, variables, x)["bn"]
    np.testing.assert_array_equal(got.count, [24] * 3)
    np.testing.assert_allclose(got.var, x.var(0), rtol=1e-5)
    # Whoever makes everything mutable did not ask for moments.
    _, updates = model.apply(variables, x, mutable=True)
    assert set(updates) == {"params", "batch_stats"}


def test_layers_inside_remat_and_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = jaxbn.linen.BatchNorm(use_running_average=False)(x)
            return nn.Dense(3)(y) * 3, None

    def stack(collections):
        return nn.scan(
            nn.remat(Block),
            variable_axes=dict.fromkeys(collections, 0),
            split_rngs={"params": True},
            length=2,
        )()

    x = np.random.default_rng(0).normal(2, 3, (16, 3)).astype(np.float32)
    model = stack(["params", "batch_stats"])
    variables = model.init(jax.random.key(0), x, None)
    got = precise.recompute(
        lambda v, x: jaxbn.linen.batch_moments(model, v, x, None),
        variables,
        [x[:5], x[5:]],
    )
    (layer,) = got.stats.values()
    assert layer.mean.shape == (2, 3)
    np.testing.assert_allclose(layer.var[0], x.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batches=[]), "batches is empty"),
        (dict(min_batches=1), "min_batches must be at least 2; got 1"),
        (
            dict(model=lambda _, x: x.mean(0)),
            "The function must return a tree of jaxbn.Moments",
        ),
        (
            dict(batches=[np.ones((2, 3)), np.full((2, 3), np.nan)]),
            "Statistics of batch 1 (from 0) are not finite",
        ),
    ],
)
def test_what_cannot_be_recomputed(change, message):
    given = dict(
        model=lambda _, x: jaxbn.moments(x),
        variables=None,
        batches=[np.ones((2, 3), np.float32)],
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        precise.recompute(**(given | change))


def test_trees_that_do_not_fit(data):
    stats = jaxbn.moments(data)
    layer = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    for wrong, message in (
        (
            {"a": stats},
            "stats['a'] has Moments of shape (3,) where batch_stats['a'] has a "
            "mean of shape (4,).",
        ),
        ({"b": stats}, "stats has ['b'] where batch_stats has ['a']."),
        (stats, "stats has Moments where batch_stats has ['a']."),
        (
            {"a": {"b": stats}},
            "stats['a'] has ['b'] where batch_stats['a'] has ['mean', 'var'].",
        ),
        ({"a": 1}, "stats['a'] has int where batch_stats['a'] has"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            precise.with_statistics({"a": layer}, wrong)


def test_layers_may_be_running_stats_or_be_named_moments(data):
    stats = jaxbn.moments(data)
    mapping = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    running = jaxbn.init_running(3, count_steps=True)
    old = {"moments": mapping, "b": running}
    new = precise.with_statistics(old, {"moments": stats})
    np.testing.assert_array_equal(new["moments"]["mean"], stats.mean)
    assert new["b"] is running
    new = precise.with_statistics(old, {"b": {"moments": stats}})
    assert new["moments"] is mapping and new["b"].steps is running.steps
    np.testing.assert_array_equal(new["b"].mean, stats.mean)


def test_layers_that_hand_out_nothing_are_named(data):
    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="old")(x)

    variables = Flax().init(jax.random.key(0), data)
    with pytest.raises(
        ValueError, match="old: flax.linen.BatchNorm does not return"
    ):
        jaxbn.linen.batch_moments(Flax(), variables, data)
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="layers/0: flax.nnx.BatchNorm does not return"
    ):
        jaxbn.nnx.batch_moments(model, data)


def test_a_bar_is_shown(capsys):
    precise.recompute(
        lambda _, x: jaxbn.moments(x),
        None,
        [np.ones((2, 3))] * 2,
        progress=True,
    )
    assert "statistics" in capsys.readouterr().out
