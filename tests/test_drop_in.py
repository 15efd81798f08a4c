"""What users of flax's layer do with it, done with ours."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.nnx
from jaxbn import Scope
from jaxbn.linen import BatchNorm

pytestmark = pytest.mark.sample(3)

N, C = 16, 6
IDS = np.arange(N) % 2


def draw(*shape, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(offset, 1, shape or (N, C)).astype(np.float32)


X = draw()


def both(**fields):
    """flax's layer and ours, and variables for them."""
    theirs, ours = nn.BatchNorm(**fields), BatchNorm(**fields)
    return theirs, ours, ours.init(jax.random.key(0), X[:1])


def train(module, variables, x, **call):
    return module.apply(variables, x, mutable=["batch_stats"], **call)


def in_vmap(fn, *args):
    return jax.jit(jax.vmap(fn, axis_name="batch"))(*args)


class TestFeaturesOnly:
    """An example without a batch axis, as in per-example code."""

    def test_training_over_a_mapped_axis(self):
        theirs, ours, v = both(use_running_average=False, axis_name="batch")
        got, want = (
            in_vmap(lambda x, m=m: train(m, v, x), X) for m in (ours, theirs)
        )
        chex.assert_trees_all_close(got, want, atol=1e-6)

    def test_inference_and_its_gradient(self):
        theirs, ours, v = both(use_running_average=True)
        for module in (theirs, ours):
            assert module.init(jax.random.key(0), X[0])
        chex.assert_trees_all_close(
            ours.apply(v, X[0]), theirs.apply(v, X[0]), rtol=1e-6
        )
        got, want = (
            in_vmap(jax.grad(lambda x, m=m: jnp.sin(m.apply(v, x)).sum()), X)
            for m in (ours, theirs)
        )
        chex.assert_trees_all_close(got, want, rtol=1e-5)

    def test_nnx(self):
        def make(axis_name=None):
            return jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0), axis_name=axis_name)

        got = in_vmap(lambda x: make("batch")(x), X)
        want, _ = jaxbn.batch_norm(X)
        chex.assert_trees_all_close(got, want, atol=1e-6)
        layer = make()
        layer.eval()
        assert layer(X[0]).shape == (C,)

    def test_alone_it_is_one_example(self):
        y, batch = jaxbn.batch_norm(X[0], jnp.ones(C), jnp.full(C, 3.0))
        chex.assert_trees_all_close(y, np.full(C, 3.0), atol=1e-6)
        chex.assert_trees_all_equal(batch.count, np.float32(1))
        chex.assert_trees_all_equal(batch.mean, X[0])
        chex.assert_trees_all_equal(jaxbn.moments(X[0]).m2, np.zeros(C))

    def test_masks_ids_and_groups(self):
        keep = X > -0.5
        norm = functools.partial(jaxbn.batch_norm, axis_name="batch")
        _, batch = in_vmap(lambda x, k: norm(x, where=k), X, keep)
        chex.assert_trees_all_close(
            batch.var[0], np.var(X, 0, where=keep), rtol=1e-5
        )
        scope = Scope(num_ids=2)
        y, _ = in_vmap(lambda x, i: norm(x, ids=i, sharing=scope), X, IDS)
        want, _ = jaxbn.batch_norm(X, ids=IDS, sharing=scope)
        chex.assert_trees_all_close(y, want, atol=1e-6)
        scope = Scope(normalize_over=4)
        y, _ = in_vmap(lambda x: norm(x, sharing=scope), X)
        want, _ = jaxbn.batch_norm(X, sharing=scope)
        chex.assert_trees_all_close(y, want, atol=1e-5)

    def test_inference_with_ids_and_weights(self):
        mean, var = draw(2, C, seed=1), np.square(draw(2, C, seed=2)) + 1
        want = jaxbn.normalize(X, mean, var, ids=IDS)
        got = in_vmap(lambda x, i: jaxbn.normalize(x, mean, var, ids=i), X, IDS)
        chex.assert_trees_all_close(got, want, rtol=1e-5)
        weighted = functools.partial(
            jaxbn.normalize_weighted, mean=mean[0], var=var[0], weight=0.2
        )
        chex.assert_trees_all_close(
            in_vmap(weighted, X), weighted(X), rtol=1e-5
        )


class TestNames:
    """Which names that are not bound say that x is global."""

    def setup_method(self):
        self.mesh = jax.make_mesh(
            (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
        )
        _, self.module, self.variables = both(
            use_running_average=False, axis_name="data"
        )
        self.want, _ = train(self.module, self.variables, X)

    def run(self, x):
        return train(self.module, self.variables, x)[0]

    def test_a_mesh_axis_that_shard_map_leaves_to_the_compiler(self):
        with jax.set_mesh(self.mesh):
            run = jax.shard_map(
                self.run,
                in_specs=P(),
                out_specs=P(),
                axis_names={"model"},
            )
            got = jax.jit(run)(
                jax.device_put(X, NamedSharding(self.mesh, P("data")))
            )
        chex.assert_trees_all_close(got, self.want, atol=1e-6)

    @pytest.mark.parametrize("with_mesh", (False, True))
    def test_an_ensemble_under_vmap(self, with_mesh):
        run = jax.jit(jax.vmap(self.run, axis_name="ensemble"))
        stacked = jnp.stack([X, X + 1])
        if with_mesh:
            with jax.set_mesh(self.mesh):
                got = run(stacked)
        else:
            got = run(stacked)
        chex.assert_trees_all_close(got[1], self.want, atol=1e-5)

    @pytest.mark.parametrize("bound", ("dat", "dta", "Data"))
    def test_a_typo_under_vmap(self, bound):
        with pytest.raises(ValueError, match="'data' is not bound here"):
            jax.vmap(self.run, axis_name=bound)(jnp.stack([X, X]))

    def test_any_other_name_in_shard_map(self):
        run = jax.shard_map(
            lambda x: jaxbn.batch_norm(x, axis_name="batch")[0],
            mesh=self.mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
        with pytest.raises(ValueError, match="'batch' is not bound here"):
            run(X)


def test_channels_sharded_over_an_explicit_mesh():
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2
    )
    _, ours, v = both(use_running_average=False, axis_name="data")
    want_y, want = train(ours, v, X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data", "model")))
        assert ours.init(jax.random.key(0), x)
        step = jax.jit(functools.partial(train, ours))
        y, new = step(v, x)
        mean = new["batch_stats"]["mean"]
        assert jax.typeof(mean).sharding.spec == P("model")
        y_again, _ = step({**v, **new}, x)
        grad = jax.jit(jax.grad(lambda x: jnp.sin(train(ours, v, x)[0]).sum()))
        dx = grad(x)
    chex.assert_trees_all_close(y, want_y, atol=1e-6)
    chex.assert_trees_all_close(y_again, want_y, atol=1e-5)
    chex.assert_trees_all_close(new, want, rtol=1e-5, atol=1e-6)
    want_dx = jax.grad(lambda x: jnp.sin(train(ours, v, x)[0]).sum())(X)
    chex.assert_trees_all_close(dx, want_dx, atol=1e-5)


LOSSES = {
    "jit": lambda loss: jax.jit(loss),
    "checkpoint": lambda loss: jax.checkpoint(loss),
    "scan": lambda loss: (
        lambda x: jax.lax.scan(
            lambda total, _: (total + loss(x) / 2, None), 0.0, None, length=2
        )[0]
    ),
}


@pytest.mark.parametrize("inner", LOSSES)
@pytest.mark.parametrize("outer", ("grad", "jit of grad", "hessian"))
def test_vmap_inside_of_what_is_differentiated(inner, outer):
    """The rule of a derivative runs after vmap has returned."""

    def loss(norm, x):
        y = jax.vmap(norm, axis_name="data")(x)
        return (jnp.sin(y) * jnp.arange(C)).sum()

    def ours(x):
        return jaxbn.batch_norm(x, axis_name="data")[0]

    def plain(x):
        mean = jax.lax.pmean(x.mean(0), "data")
        var = jax.lax.pmean(jnp.square(x - mean).mean(0), "data")
        return (x - mean) / jnp.sqrt(var + 1e-5)

    def derivative(norm):
        f = LOSSES[inner](functools.partial(loss, norm))
        transform = {
            "grad": jax.grad(f),
            "jit of grad": jax.jit(jax.grad(f)),
            "hessian": lambda x: jax.jvp(jax.grad(f), (x,), (jnp.cos(x),))[1],
        }
        return transform[outer](X.reshape(4, 4, C))

    got, want = derivative(ours), derivative(plain)
    chex.assert_trees_all_close(got, want, atol=2e-5 * np.abs(want).max())


class TestScopes:
    @pytest.mark.parametrize(
        "options",
        (
            dict(normalize_over=4),
            dict(normalize_over=4, num_ids=2),
            {},
        ),
    )
    def test_no_examples(self, options):
        ids = jnp.zeros(0, jnp.int32) if "num_ids" in options else None
        y, batch = jaxbn.batch_norm(X[:0], ids=ids, sharing=Scope(**options))
        assert y.shape == (0, C)
        chex.assert_trees_all_equal(batch.mean, jnp.zeros_like(batch.mean))

    def test_examples_without_values(self):
        def norm(x):
            return jaxbn.batch_norm(x, sharing=Scope(normalize_over=2))

        y, pull, batch = jax.vjp(norm, jnp.ones((4, 0, C)), has_aux=True)
        assert y.shape == pull(y)[0].shape == (4, 0, C)
        chex.assert_trees_all_equal(batch.mean, jnp.zeros(C))
        assert batch.count == 0

    @pytest.mark.parametrize("is_complex", (False, True))
    def test_masks_per_feature(self, is_complex):
        x = (X + 1j * X[::-1]).astype(np.complex64) if is_complex else X
        keep = X > -0.5
        for options in (
            {},
            dict(num_ids=2),
            dict(normalize_over=4, num_ids=2),
        ):
            ids = IDS if "num_ids" in options else None
            y, batch = jaxbn.batch_norm(
                x, where=keep, ids=ids, sharing=Scope(**options)
            )
            assert np.isfinite(y).all()
            for row in range(2 if "num_ids" in options else 1):
                rows = slice(None) if ids is None else ids == row
                want = np.var(x[rows], 0, where=keep[rows])
                got = batch.var if ids is None else batch.var[row]
                chex.assert_trees_all_close(got, want, rtol=1e-4)

    @pytest.mark.parametrize(
        "size, examples, nearest", ((1, 4, 2), (2, 10, 4), (4, 7, 8))
    )
    def test_groups_that_cannot_share_examples(self, size, examples, nearest):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        message = f"the nearest valid value is {nearest}"
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            jaxbn.batch_norm(
                draw(examples, C),
                axis_name="data",
                sharing=Scope(group_size=size),
            )


class TestPool:
    STATS = {"mean": np.float32([[0], [4]]), "var": np.ones((2, 1), np.float32)}

    @pytest.mark.parametrize(
        "counts, mean, var",
        (
            ((0.1, 0.3), 3.0, 4.0),
            ((1_500_000_000, 1_500_000_000), 2.0, 5.0),
            (None, 2.0, 5.0),
        ),
    )
    @pytest.mark.parametrize("x64", (False, True))
    def test_weights(self, counts, mean, var, x64):
        with jax.enable_x64(x64):
            counts = None if counts is None else jnp.asarray(counts)
            stats = jax.tree.map(jnp.asarray, self.STATS)
            stacked = jaxbn.pool(stats, counts=counts)
            mapped = jax.jit(
                jax.vmap(
                    lambda s, c: jaxbn.pool(s, counts=c, axis_name="i"),
                    in_axes=(0, None if counts is None else 0),
                    axis_name="i",
                )
            )(stats, counts)
        for got in (stacked, jax.tree.map(lambda a: a[0], mapped)):
            np.testing.assert_allclose(got["mean"], [mean], rtol=1e-6)
            np.testing.assert_allclose(got["var"], [var], rtol=1e-6)


def test_cumulative_average_in_float64():
    with jax.enable_x64(True):
        running = jaxbn.init_running(1, dtype=jnp.float64, count_steps=True)
        values = np.random.default_rng(0).normal(size=7)
        for value in values:
            batch = jaxbn.Moments(
                jnp.float64(2), jnp.array([value]), jnp.array([1.0])
            )
            running = jaxbn.update_running(running, batch, decay=None)
        np.testing.assert_allclose(running.mean, [values.mean()], rtol=1e-14)


class TestMaskedNaN:
    """A masked NaN reaches neither output nor gradient in inference either."""

    @pytest.mark.parametrize("poison", (np.nan, np.inf))
    @pytest.mark.parametrize(
        "fields",
        (
            dict(
                running=jaxbn.Running(mode="frozen"), use_running_average=False
            ),
            dict(use_running_average=True),
            dict(use_running_average=True, inference=jaxbn.ExampleWeight(0.1)),
            dict(use_running_average=True, inference=jaxbn.Prior(3.0)),
        ),
    )
    def test_layers(self, fields, poison):
        module = BatchNorm(**fields)
        x, mask = X.reshape(4, 4, C).copy(), np.ones((4, 4, 1), bool)
        v = module.init(jax.random.key(0), x)
        mask[0, 1] = False
        poisoned = x.copy()
        poisoned[0, 1] = poison

        def loss(params, x):
            y, _ = train(module, {**v, "params": params}, x, mask=mask)
            return jnp.where(mask, jnp.sin(y), 0).sum(), y

        slope = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, y), grads = slope(v["params"], poisoned)
        chex.assert_tree_all_finite((y, grads))
        (_, clean), want = slope(v["params"], x)
        chex.assert_trees_all_close(y[1:], clean[1:], atol=1e-6)
        chex.assert_trees_all_close(grads[0], want[0], rtol=1e-5)

    def test_says_what_a_wrong_mask_is(self):
        message = re.escape("where must broadcast to x; got where bool[3]")
        with pytest.raises(ValueError, match=message):
            jaxbn.normalize(
                X, jnp.zeros(C), jnp.ones(C), where=np.ones(3, bool)
            )
