"""The linen module against flax's own, and its synchronization."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm
from tests.helpers import reference

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]


def draw(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(1, 2, shape), dtype)


FIELDS = (
    {},
    {"axis": 1},
    {"axis": (1, 3)},
    {"use_bias": False},
    {"use_scale": False},
    {"use_bias": False, "use_scale": False},
    {"momentum": 0.7, "epsilon": 1e-2},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"scale_init": nn.initializers.zeros},
    {"bias_init": nn.initializers.normal()},
    {"use_fast_variance": False},
    {"force_float32_reductions": True},
)


class DropInTest(parameterized.TestCase):
    def test_same_fields_with_the_same_defaults(self):
        def fields(module):
            return {
                name: (f.default, f.default_factory)
                for name, f in module.__dataclass_fields__.items()
                if name not in ("parent", "name")
            }

        assert fields(BatchNorm).items() >= fields(nn.BatchNorm).items()
        # Flax's come first, and in its order, for whoever gives them by place.
        names = list(fields(nn.BatchNorm))
        assert list(fields(BatchNorm))[: len(names)] == names

    @parameterized.product(
        fields=FIELDS, dtype=(jnp.float32, jnp.bfloat16), masked=(False, True)
    )
    def test_same_numbers_as_flax_on_one_device(self, fields, dtype, masked):
        x = draw(6, 4, 4, 3, dtype=dtype)
        mask = np.arange(6)[:, None, None, None] < 4 if masked else None
        ours, flax = BatchNorm(**fields), nn.BatchNorm(**fields)
        variables = ours.init(jax.random.key(0), x, False)
        chex.assert_trees_all_equal(
            variables, flax.init(jax.random.key(0), x, False)
        )
        got, want = (
            module.apply(
                variables, x, False, mask=mask, mutable=["batch_stats"]
            )
            for module in (ours, flax)
        )
        chex.assert_trees_all_equal_dtypes(got, want)
        narrow = got[0].dtype == jnp.bfloat16
        tolerance = 2e-2 if narrow else 1e-4
        chex.assert_trees_all_close(got[0], want[0], atol=tolerance)
        chex.assert_trees_all_close(got[1], want[1], rtol=1e-4, atol=1e-6)

        variables = {**variables, **want[1]}
        got, want = (
            module.apply(variables, x, True) for module in (ours, flax)
        )
        chex.assert_trees_all_equal_dtypes(got, want)
        chex.assert_trees_all_close(got, want, atol=tolerance)

    def test_checkpoints_move_both_ways(self):
        class Net(nn.Module):
            norm: type

            @nn.compact
            def __call__(self, x, train):
                x = nn.Conv(4, (3, 3))(x)
                return self.norm(use_running_average=not train, name="bn")(x)

        x = draw(4, 6, 6, 3)
        ours, flax = Net(BatchNorm), Net(nn.BatchNorm)
        for write, read in ((ours, flax), (flax, ours)):
            variables = write.init(jax.random.key(0), x, False)
            _, state = write.apply(variables, x, True, mutable=["batch_stats"])
            variables = {**variables, **state}
            chex.assert_trees_all_close(
                read.apply(variables, x, False),
                write.apply(variables, x, False),
                atol=1e-5,
            )

    def test_integers_are_read_as_flax_reads_them(self):
        x = jnp.arange(24).reshape(8, 3)
        variables = BatchNorm().init(jax.random.key(0), x, False)
        got, want = (
            module.apply(variables, x, False, mutable=["batch_stats"])
            for module in (BatchNorm(), nn.BatchNorm())
        )
        chex.assert_trees_all_close(got, want, rtol=1e-5)

    def test_use_running_average_is_given_once(self):
        x = draw(4, 3)
        with pytest.raises(ValueError, match="use_running_average"):
            BatchNorm().init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="use_running_average"):
            BatchNorm(use_running_average=True).init(jax.random.key(0), x, True)

    def test_wrong_mask_is_explained(self):
        x = draw(4, 2, 2, 3)
        module = BatchNorm(use_running_average=False)
        with pytest.raises(ValueError, match=re.escape("mask[:, None, None")):
            module.init(jax.random.key(0), x, mask=jnp.ones(4, bool))

    def test_initialization_leaves_statistics_alone(self):
        x = 100 + draw(4, 3)
        stats = BatchNorm().init(jax.random.key(0), x, False)["batch_stats"]
        chex.assert_trees_all_equal(
            stats, {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        )


class SynchronizedTest(parameterized.TestCase):
    """One module object with axis_name in every context."""

    def setUp(self):
        super().setUp()
        self.module = BatchNorm(axis_name="data", use_running_average=False)
        self.x = draw(16, 3)
        rng = np.random.default_rng(1)
        self.keep = rng.random((16, 1)) < 0.6
        self.keep[:2] = False  # of eight devices the first sees nothing
        self.variables = self.module.init(jax.random.key(0), self.x)

    def apply(self, variables, x, keep):
        return self.module.apply(
            variables, x, mask=keep, mutable=["batch_stats"]
        )

    def check(self, y, state, *, steps=1):
        want = reference.batch_norm(
            self.x, np.ones(3), np.zeros(3), self.keep, np.zeros_like(self.x)
        )
        decay = 0.99**steps
        stats = {
            "mean": (1 - decay) * want.mean,
            "var": decay + (1 - decay) * want.var,
        }
        chex.assert_trees_all_close(y, want.y, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(state["batch_stats"], stats, rtol=1e-5)

    @parameterized.parameters(1, 10)
    def test_shard_map(self, steps):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        step = jax.jit(
            jax.shard_map(
                self.apply,
                mesh=mesh,
                in_specs=(P(), P("data"), P("data")),
                out_specs=(P("data"), P()),
            )
        )
        variables = self.variables
        for _ in range(steps):
            y, state = step(variables, self.x, self.keep)
            variables = {**variables, **state}
        self.check(y, state, steps=steps)

    def test_pmap(self):
        split = [a.reshape(8, 2, -1) for a in (self.x, self.keep)]
        step = jax.pmap(self.apply, "data", in_axes=(None, 0, 0))
        y, state = step(self.variables, *split)
        for device in range(8):
            one = jax.tree.map(lambda a, i=device: a[i], state)
            self.check(y.reshape(16, 3), one)

    def test_vmap(self):
        split = [a.reshape(8, 2, -1) for a in (self.x, self.keep)]
        step = jax.vmap(self.apply, (None, 0, 0), (0, None), axis_name="data")
        y, state = step(self.variables, *split)
        self.check(y.reshape(16, 3), state)

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_jit_on_global_arrays(self, kind):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh, P("data"))
        with jax.set_mesh(mesh):
            x, keep = jax.device_put((self.x, self.keep), sharding)
            self.check(*jax.jit(self.apply)(self.variables, x, keep))

    def test_eager(self):
        self.check(*self.apply(self.variables, self.x, self.keep))

    def test_nonfinite_batch_on_one_device_is_skipped_on_all(self):
        module = BatchNorm(
            axis_name="data",
            use_running_average=False,
            running=jaxbn.Running(skip_nonfinite=True),
        )
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        step = jax.jit(
            jax.shard_map(
                lambda v, x: module.apply(v, x, mutable=["batch_stats"])[1],
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P(),
            )
        )
        variables = module.init(jax.random.key(0), self.x)
        assert variables["batch_stats"]["skipped"] == 0
        bad = self.x.at[5, 1].set(jnp.inf)
        for x in (bad, bad):
            variables = {**variables, **step(variables, x)}
        stats = variables["batch_stats"]
        chex.assert_trees_all_equal(
            stats, {"mean": np.zeros(3), "var": np.ones(3), "skipped": 2}
        )
        stats = step(variables, self.x)["batch_stats"]
        assert stats["skipped"] == 2 and (stats["mean"] != 0).all()

    def test_statistics_and_affine_per_id(self):
        module = BatchNorm(
            axis_name="data",
            use_running_average=False,
            sharing=jaxbn.Scope(num_ids=2),
            per_id="both",
            momentum=0.0,
        )
        ids = np.arange(16) % 2
        variables = module.init(jax.random.key(0), self.x, ids=ids)
        assert jax.tree.map(jnp.shape, variables) == {
            "params": {"scale": (2, 3), "bias": (2, 3)},
            "batch_stats": {"mean": (2, 3), "var": (2, 3)},
        }
        variables["params"]["bias"] = jnp.array([[1.0] * 3, [2.0] * 3])
        y, state = module.apply(
            variables, self.x, ids=ids, mutable=["batch_stats"]
        )
        for i in range(2):
            rows = np.asarray(self.x, np.float64)[ids == i]
            stats = state["batch_stats"]
            chex.assert_trees_all_close(stats["var"][i], rows.var(0), rtol=1e-5)
            chex.assert_trees_all_close(
                y[ids == i].mean(0), np.full(3, 1.0 + i), rtol=1e-5
            )
        inference = module.clone(use_running_average=True)
        again = inference.apply({**variables, **state}, self.x, ids=ids)
        chex.assert_trees_all_close(again, y, rtol=1e-4, atol=1e-5)

    def test_groups_keep_running_statistics_of_all(self):
        grouped = self.module.clone(sharing=jaxbn.Scope(group_size=2))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        def step(module):
            sharded = jax.shard_map(
                lambda v, x: module.apply(v, x, mutable=["batch_stats"]),
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=(P("data"), P()),
            )
            return jax.jit(sharded)(self.variables, self.x)

        y, state = step(grouped)
        _, whole = step(self.module)
        chex.assert_trees_all_close(state, whole, rtol=1e-5)
        pairs = np.asarray(self.x).reshape(4, 4, 3)
        want = (pairs - pairs.mean(1, keepdims=True)) / pairs.std(
            1, keepdims=True
        )
        chex.assert_trees_all_close(y, want.reshape(16, 3), atol=1e-4)

    def test_complex_input(self):
        x = (self.x + 1j * self.x[::-1]).astype(np.complex64)
        got, want = (
            module.apply(
                module.init(jax.random.key(0), x), x, mutable=["batch_stats"]
            )
            for module in (self.module, nn.BatchNorm(use_running_average=False))
        )
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)

    def test_empty_batch_leaves_running_statistics_alone(self):
        nothing = np.zeros((16, 1), bool)
        _, state = self.apply(self.variables, self.x, nothing)
        chex.assert_trees_all_equal(
            state["batch_stats"], self.variables["batch_stats"]
        )
