"""Scale and bias by id while all examples share statistics."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxbn
import jaxbn.nnx
from tests.helpers import reference
from tests.helpers.contexts import (
    CHANNELS,
    NUM_IDS,
    PARTITIONS,
    in_shard_map,
    in_vmap,
    on_global_arrays,
    problem,
)
from tests.helpers.layers import draw, linen_layer, nnx_layer

pytestmark = pytest.mark.sample(3)

IDS = np.arange(8) % 2
SHIFT = np.float32(1 + IDS[:, None])  # with a bias of 1 and 2


def want(arguments, labels):
    x, scale, bias, keep, cotangent, ids = arguments
    gain = scale[ids][:, None]
    y, dx, xhat = np.zeros((3, *x.shape))
    for label in np.unique(labels):
        rows = labels == label
        one = reference.batch_norm(
            x[rows], 1.0, 0.0, keep[rows], (cotangent * gain)[rows]
        )
        xhat[rows], dx[rows] = one.y, one.dx
    y = xhat * gain + bias[ids][:, None]
    dscale, dbias = np.zeros((2, NUM_IDS, CHANNELS))
    np.add.at(dscale, ids, (cotangent * xhat).sum(1))
    np.add.at(dbias, ids, cotangent.sum(1))
    return y, dx, dscale, dbias


class TestSharedStatistics:
    @pytest.mark.parametrize("name", PARTITIONS)
    @pytest.mark.parametrize("masked", (True, False))
    def test_groups(self, name, masked):
        self.check(in_shard_map, name, masked)

    @pytest.mark.parametrize("name", ("everything", "normalize_over=2"))
    @pytest.mark.parametrize(
        "run",
        (
            in_vmap,
            on_global_arrays,
            functools.partial(on_global_arrays, kind=AxisType.Explicit),
            functools.partial(in_shard_map, check_vma=False),
        ),
        ids=("vmap", "jit", "explicit", "unchecked"),
    )
    def test_contexts(self, run, name):
        self.check(run, name, True)

    def check(self, run, name, masked):
        scope, labels = PARTITIONS[name]
        arguments = problem(masked, True)
        (y, batch), grads = run(scope, arguments)
        for got, right in zip((y, *grads), want(arguments, labels)):
            np.testing.assert_allclose(
                got, right, rtol=0, atol=1e-4 * np.abs(right).max()
            )
        x, _, _, keep, _, _ = arguments
        kept = np.broadcast_to(keep, x.shape)
        x = np.where(kept, x, 0).astype(np.float64)
        np.testing.assert_allclose(
            batch.mean, x.mean((0, 1), where=kept), rtol=1e-5
        )
        assert batch.var.shape == (CHANNELS,)

    def test_derivatives_in_float64(self):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            x = rng.normal(size=(8, 3))
            affine = rng.normal(size=(2, 2, 3))

            def f(x, affine):
                y, _ = jaxbn.batch_norm(x, *affine, ids=IDS)
                return jnp.sin(y)

            check_grads(jax.jit(f), (x, affine), order=2, modes=("fwd", "rev"))

    def test_renorm(self):
        scale, bias = draw(2, 2, 3)
        x = draw(8, 3)
        running = jaxbn.RunningStats(jnp.ones(3), jnp.full(3, 3.0))
        xhat, _ = jaxbn.batch_renorm(x, running=running, r_max=1.1, d_max=0.1)
        y, _ = jaxbn.batch_renorm(
            x, scale, bias, running=running, ids=IDS, r_max=1.1, d_max=0.1
        )
        chex.assert_trees_all_close(y, xhat * scale[IDS] + bias[IDS], rtol=1e-5)

    def test_inference(self):
        x, mean, var = draw(8, 3), draw(3), jnp.square(draw(3))
        scale, bias = draw(2, 2, 3)
        for fn in (
            jaxbn.normalize,
            functools.partial(jaxbn.normalize_weighted, weight=0.2),
        ):
            xhat = fn(x, mean, var)
            y = fn(x, mean, var, scale, bias, ids=IDS)
            want = xhat * scale[IDS] + bias[IDS]
            chex.assert_trees_all_close(y, want, rtol=1e-5)
            only = fn(x, mean, var, None, bias, ids=IDS)
            chex.assert_trees_all_close(only, xhat + bias[IDS], rtol=1e-5)

    def test_an_unknown_id_is_nan(self):
        x, scale = draw(4, 3), draw(2, 3)
        y, batch = jaxbn.batch_norm(x, scale, ids=jnp.array([0, 1, 2, -1]))
        assert np.isnan(y[2:]).all() and np.isfinite(y[:2]).all()
        chex.assert_trees_all_close(batch, jaxbn.moments(x))

    def test_ids_that_choose_nothing(self):
        x = draw(8, 3)
        with pytest.raises(ValueError, match="ids select rows of statistics"):
            jaxbn.batch_norm(x, jnp.ones(3), ids=IDS)
        with pytest.raises(ValueError, match="ids select rows of statistics"):
            jaxbn.normalize(x, jnp.ones(3), jnp.ones(3), ids=IDS)
        message = r"bias must have shape \(3,\) or \(2, 3\)"
        with pytest.raises(ValueError, match=message):
            jaxbn.batch_norm(x, jnp.ones((2, 3)), jnp.ones((4, 3)), ids=IDS)


class TestLayers:
    """Class-conditional batch norm, as in generators of images."""

    def test_linen(self):
        x, module = (
            draw(8, 3),
            linen_layer(sharing=jaxbn.Scope(num_ids=2), per_id="affine"),
        )
        v = module.init(jax.random.key(0), x, ids=IDS)
        assert jax.tree.map(jnp.shape, v) == {
            "params": {"scale": (2, 3), "bias": (2, 3)},
            "batch_stats": {"mean": (3,), "var": (3,)},
        }
        v["params"]["bias"] = jnp.array([[1.0] * 3, [2.0] * 3])
        xhat, want = linen_layer().apply(
            {"batch_stats": v["batch_stats"]} | linen_params(),
            x,
            mutable=["batch_stats"],
        )
        y, state = module.apply(v, x, ids=IDS, mutable=["batch_stats"])
        chex.assert_trees_all_close(y, xhat + SHIFT, atol=1e-6)
        chex.assert_trees_all_equal(state, want)
        for fields in (
            {},
            dict(inference=jaxbn.ExampleWeight(0.1)),
            dict(inference=jaxbn.Prior(3.0)),
        ):
            evaluate = module.clone(use_running_average=True, **fields)
            shifted = evaluate.apply(v, x, ids=IDS)
            plain = evaluate.apply(
                {**v, "params": {**v["params"], "bias": jnp.zeros((2, 3))}},
                x,
                ids=IDS,
            )
            chex.assert_trees_all_close(
                shifted - plain, np.tile(SHIFT, 3), atol=1e-5
            )
        with pytest.raises(ValueError, match="num_ids of the layer and ids"):
            module.apply(v, x, mutable=["batch_stats"])

    def test_nnx(self):
        x, layer = (
            draw(8, 3),
            nnx_layer(sharing=jaxbn.Scope(num_ids=2), per_id="affine"),
        )
        assert layer.scale.shape == (2, 3) and layer.mean.shape == (3,)
        layer.bias[...] = jnp.array([[1.0] * 3, [2.0] * 3])
        xhat = nnx_layer()(x)
        chex.assert_trees_all_close(layer(x, ids=IDS), xhat + SHIFT, atol=1e-6)
        found = jaxbn.nnx.batch_moments(layer, x, ids=IDS)
        chex.assert_trees_all_close(found[""].mean, x.mean(0), rtol=1e-6)

    @pytest.mark.parametrize("per_id", ("affine", "both"))
    def test_partition_names_are_those_of_a_row(self, per_id):
        options = dict(sharing=jaxbn.Scope(num_ids=2), per_id=per_id)
        mesh = jax.make_mesh(
            (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
        )
        normal = nn.with_partitioning(nn.initializers.normal(1.0), ("model",))
        with jax.set_mesh(mesh):
            module = linen_layer(scale_init=normal, **options)
            v = module.init(jax.random.key(0), draw(8, 4), ids=IDS)
            layer = jaxbn.nnx.BatchNorm(
                4,
                rngs=nnx.Rngs(0),
                scale_metadata={"out_sharding": ("model",)},
                **options,
            )
            params = nnx.state(layer, nnx.Param)
            spec = nnx.get_partition_spec(params)["scale"].get_value()
        assert nn.get_partition_spec(v)["params"]["scale"] == P(None, "model")
        rows = v["params"]["scale"].value
        assert rows.shape == (2, 4) and (rows[0] != rows[1]).all()
        assert spec == P(None, "model")


def linen_params():
    return {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
