"""The nnx module under nnx's and jax's transforms, and synchronized."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn.nnx import BatchNorm
from jaxbn.testing import collectives
from tests.helpers import reference
from tests.helpers.nnx_layers import draw, make, running, stats


class TransformsTest(parameterized.TestCase):
    def test_training_loop_under_jit_follows_flax(self):
        class Net(nnx.Module):
            def __init__(self, norm):
                rngs = nnx.Rngs(0)
                self.first = nnx.Linear(5, 8, rngs=rngs)
                self.norm = norm(8, momentum=0.5, rngs=rngs)
                self.last = nnx.Linear(8, 1, rngs=rngs)

            def __call__(self, x):
                return self.last(nnx.relu(self.norm(self.first(x))))

        def loss(net, x):
            return jnp.mean((net(x) - x[:, :1] ** 2) ** 2)

        @nnx.jit
        def step(net, x):
            value, grads = nnx.value_and_grad(loss)(net, x)
            params = nnx.state(net, nnx.Param)
            nnx.update(
                net, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
            )
            return value

        ours, flax = Net(BatchNorm), Net(nnx.BatchNorm)
        losses = [
            (step(ours, x), step(flax, x))
            for x in (draw(32, 5, seed=seed) for seed in range(10))
        ]
        chex.assert_trees_all_close(*np.array(losses).T, rtol=1e-3)
        chex.assert_trees_all_close(
            nnx.state(ours), nnx.state(flax), rtol=1e-3, atol=1e-4
        )
        ours.eval()
        flax.eval()
        x = draw(32, 5, seed=11)
        got, want = (nnx.jit(loss)(net, x) for net in (ours, flax))
        chex.assert_trees_all_close(got, want, rtol=1e-3)

    @parameterized.parameters(False, True)
    def test_gradients(self, masked):
        x, cotangent = draw(8, 3), draw(8, 3, seed=1)
        keep = np.arange(8)[:, None] < (5 if masked else 8)
        module = make()
        want = reference.batch_norm(
            x, module.scale[...], module.bias[...], keep, cotangent
        )

        def loss(module, x):
            return (module(x, mask=keep) * cotangent).sum()

        grads, dx = nnx.grad(loss, argnums=(0, 1))(module, x)
        got = dx, grads["scale"][...], grads["bias"][...]
        chex.assert_trees_all_close(
            got, (want.dx, want.dscale, want.dbias), rtol=1e-4, atol=1e-5
        )
        # The update made inside arrives, and carries no gradient.
        chex.assert_trees_all_close(
            stats(module), running([x], keep), rtol=1e-5
        )
        gradient = nnx.grad(
            lambda m, x: m(x).sum() * 0 + m.mean[...].sum(), argnums=1
        )(module, x)
        chex.assert_trees_all_equal(gradient, jnp.zeros_like(x))

    def test_stacked_modules_under_vmap(self):
        x = draw(4, 8, 3)
        stack = nnx.vmap(lambda key: BatchNorm(3, rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 4)
        )
        y = nnx.vmap(lambda module, x: module(x))(stack, x)
        for i in range(4):
            one = BatchNorm(3, rngs=nnx.Rngs(0))
            chex.assert_trees_all_close(y[i], one(x[i]), atol=1e-6)
            row = jax.tree.map(lambda a, i=i: a[i], stats(stack))
            chex.assert_trees_all_close(row, stats(one), rtol=1e-6)

    def test_scan(self):
        batches = draw(10, 8, 3)
        module = make()
        step = nnx.scan(
            lambda module, x: (module, module(x)),
            in_axes=(nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )
        module, y = step(module, batches)
        chex.assert_trees_all_close(stats(module), running(batches), rtol=1e-5)
        want = make()
        chex.assert_trees_all_close(y[0], want(batches[0]), atol=1e-5)

    def test_eval_shape(self):
        module = nnx.eval_shape(make)
        y = nnx.eval_shape(lambda module, x: module(x), module, draw(8, 3))
        assert (y.shape, y.dtype) == ((8, 3), jnp.float32)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            nnx.state(module), nnx.state(make())
        )

    def test_split_and_merge(self):
        module = make(axis_name="data", momentum=0.5)
        module(draw(8, 3))
        graph, batch_stats, params = nnx.split(module, nnx.BatchStat, nnx.Param)
        assert set(batch_stats) == {"mean", "var"}
        assert set(params) == {"scale", "bias"}
        other = nnx.merge(graph, batch_stats, params)
        assert isinstance(other, BatchNorm)
        for inference in (True, False):
            got, want = (m(draw(8, 3), inference) for m in (other, module))
            # They share variables, and so the second one has a new shift.
            chex.assert_trees_all_close(got, want, rtol=1e-5)
        chex.assert_trees_all_equal(stats(other), stats(module))

    def test_variables_that_are_references(self):
        x = draw(8, 3)
        with nnx.var_defaults(ref=True):
            module = make()
            for _ in range(2):
                jax.jit(lambda module, x: module(x))(module, x)
            chex.assert_trees_all_close(
                stats(module), running([x, x]), rtol=1e-5
            )


class SynchronizedTest(parameterized.TestCase):
    """One module with axis_name in every context."""

    def setUp(self):
        super().setUp()
        self.module = make(axis_name="data")
        self.x = draw(16, 3)
        rng = np.random.default_rng(1)
        self.keep = rng.random((16, 1)) < 0.6
        self.keep[:2] = False  # of eight devices the first sees nothing

    def apply(self, module, x, keep):
        return module(x, mask=keep)

    def check(self, y, module=None, *, steps=1):
        module = module or self.module
        scale, bias = self.module.scale[...], self.module.bias[...]
        want = reference.batch_norm(self.x, scale, bias, self.keep, self.x)
        chex.assert_trees_all_close(
            y.reshape(16, 3), want.y, rtol=1e-5, atol=1e-5
        )
        chex.assert_trees_all_close(
            stats(module), running([self.x] * steps, self.keep), rtol=1e-5
        )

    @parameterized.product(steps=(1, 10), check_vma=(True, False))
    def test_shard_map(self, steps, check_vma):
        graph, state = nnx.split(self.module)

        @jax.jit
        @jax.shard_map(
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )
        def step(state, x, keep):
            module = nnx.merge(graph, state)
            return self.apply(module, x, keep), nnx.state(module)

        for _ in range(steps):
            y, state = step(state, self.x, self.keep)
        self.check(y, nnx.merge(graph, state), steps=steps)

    def test_one_reduction_about_the_running_mean(self):
        graph, state = nnx.split(self.module)
        step = jax.shard_map(
            lambda state, x: nnx.merge(graph, state)(x),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
        found = collectives(step, state, self.x)
        assert found == {"all-reduce": (1, 2 * 3 * 4)}

    def test_gradients_in_shard_map(self):
        graph, state = nnx.split(self.module)
        cotangent = draw(16, 3, seed=1)

        def loss(module, x, keep, cotangent):
            return (self.apply(module, x, keep) * cotangent).sum()

        @jax.jit
        @jax.shard_map(
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=(P(), P("data"), P()),
        )
        def gradients(state, *batch):
            module = nnx.merge(graph, state)
            grads, dx = nnx.grad(loss, argnums=(0, 1))(module, *batch)
            return grads, dx, stats(module)

        grads, dx, after = gradients(state, self.x, self.keep, cotangent)
        want = reference.batch_norm(
            self.x,
            self.module.scale[...],
            self.module.bias[...],
            self.keep,
            cotangent,
        )
        got = dx, grads["scale"][...], grads["bias"][...]
        chex.assert_trees_all_close(
            got, (want.dx, want.dscale, want.dbias), rtol=1e-4, atol=1e-5
        )
        chex.assert_trees_all_close(
            after, running([self.x], self.keep), rtol=1e-5
        )

    def test_nnx_shard_map(self):
        step = nnx.shard_map(
            self.apply,
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
        )
        self.check(nnx.jit(step)(self.module, self.x, self.keep))

    @parameterized.parameters(nnx.pmap, nnx.vmap)
    def test_mapped(self, transform):
        split = [a.reshape(8, 2, -1) for a in (self.x, self.keep)]
        step = transform(self.apply, in_axes=(None, 0, 0), axis_name="data")
        self.check(step(self.module, *split))

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_jit_on_global_arrays(self, kind):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh, P("data"))
        with jax.set_mesh(mesh):
            x, keep = jax.device_put((self.x, self.keep), sharding)
            self.check(nnx.jit(self.apply)(self.module, x, keep))

    def test_eager(self):
        self.check(self.apply(self.module, self.x, self.keep))

    def test_groups_of_devices(self):
        groups = ((0, 2, 4, 6), (1, 3, 5, 7))
        module = make(axis_name="data", axis_index_groups=groups)
        step = nnx.shard_map(
            self.apply,
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
        )
        y = nnx.jit(step)(module, self.x, self.keep).reshape(8, 2, 3)
        x, keep = (np.reshape(a, (8, 2, -1)) for a in (self.x, self.keep))
        for group in np.array(groups):
            want = reference.batch_norm(
                x[group],
                module.scale[...],
                module.bias[...],
                keep[group],
                x[group],
            )
            chex.assert_trees_all_close(y[group], want.y, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(
            stats(module), running([self.x], self.keep), rtol=1e-5
        )

    def test_empty_batch_leaves_running_statistics_alone(self):
        self.apply(self.module, self.x, self.keep)
        before = stats(self.module)
        self.apply(self.module, self.x, np.zeros((16, 1), bool))
        chex.assert_trees_all_equal(stats(self.module), before)

    def test_another_axis_in_scope_is_an_error(self):
        step = nnx.vmap(self.apply, in_axes=(None, 0, 0), axis_name="date")
        split = [a.reshape(8, 2, -1) for a in (self.x, self.keep)]
        with pytest.raises(ValueError, match="'data' is not bound"):
            step(self.module, *split)
