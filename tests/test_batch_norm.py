"""The training formula, its derivative and its synchronization."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.helpers import reference

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]

EPSILON = 1e-5
CHANNELS = 5


def problem(*, offset=3.0, dtype=np.float32, empty=0):
    """x, scale, bias, keep, cotangent; the first `empty` examples masked."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(offset, 2, (16, 3, CHANNELS)), dtype)
    keep = rng.random((16, 3, 1)) < 0.6
    keep[:empty] = False
    # One shard of a single value, whatever the number of devices is.
    keep[empty : empty + 2] = False
    keep[empty, 0] = True
    poison = np.where(rng.random(x.shape) < 0.5, np.nan, np.inf)
    touched = rng.random((16, 1, 1)) < 0.5
    x = jnp.where(~keep & touched, poison.astype(x.dtype), x)
    scale, bias = rng.normal(1, 0.5, (2, CHANNELS)).astype(np.float32)
    # In the dtype of y, which it is rounded to on its way back.
    cotangent = jnp.asarray(rng.normal(size=x.shape), dtype)
    cotangent = np.asarray(cotangent, np.float32)
    return x, scale, bias, keep, cotangent


def value_and_grads(x, scale, bias, keep, cotangent, *, axis_name, shift=None):
    def loss(x, scale, bias):
        y, batch = jaxbn.batch_norm(
            x,
            scale,
            bias,
            where=keep,
            axis_name=axis_name,
            shift=shift,
            epsilon=EPSILON,
        )
        return (y.astype(jnp.float32) * cotangent).sum(), (y, batch)

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return out, grads


@functools.cache
def sharded(devices, with_shift=False, check_vma=True):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def step(x, scale, bias, keep, cotangent):
        shift = jnp.full(CHANNELS, 2.5) if with_shift else None
        out, (dx, *affine) = value_and_grads(
            x, scale, bias, keep, cotangent, axis_name="data", shift=shift
        )
        if not check_vma:  # then JAX does not know that these are shared
            affine = jax.lax.psum(affine, "data")
        return out, (dx, *affine)

    parts, whole = P("data"), P()
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(parts, whole, whole, parts, parts),
            out_specs=((parts, whole), (parts, whole, whole)),
            check_vma=check_vma,
        )
    )


@functools.cache
def normalized_over_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(x, keep, shift=None):
        return jaxbn.batch_norm(x, where=keep, axis_name="data", shift=shift)

    return lambda *arguments: jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P("data"), P("data"), P())[: len(arguments)],
            out_specs=(P("data"), P()),
        )
    )(*arguments)


def assert_matches_float64(got, arguments, *, rtol, y_rtol=None):
    (y, batch), (dx, dscale, dbias) = got
    want = reference.batch_norm(*arguments, epsilon=EPSILON)
    pairs = [
        ("y", y, want.y, y_rtol or rtol),
        ("mean", batch.mean, want.mean, rtol),
        ("var", batch.var, want.var, rtol),
        ("dx", dx, want.dx, y_rtol or rtol),
        ("dscale", dscale, want.dscale, rtol),
        ("dbias", dbias, want.dbias, rtol),
    ]
    np.testing.assert_array_equal(batch.count, want.count[0])
    for name, a, b, tolerance in pairs:
        scale = np.abs(b).max()
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error <= tolerance * scale, (name, error, scale)


class ExactnessTest(parameterized.TestCase):
    @parameterized.product(devices=(1, 2, 4, 8), with_shift=(False, True))
    def test_uneven_shards_equal_float64(self, devices, with_shift):
        arguments = problem(empty=4)  # of 8 devices the first two are empty
        got = sharded(devices, with_shift)(*arguments)
        assert_matches_float64(got, arguments, rtol=1e-5)

    def test_without_vma_tracking(self):
        arguments = problem(empty=2)
        got = sharded(8, check_vma=False)(*arguments)
        assert_matches_float64(got, arguments, rtol=1e-5)

    @parameterized.parameters((jnp.bfloat16, 1e-2), (jnp.float16, 1e-3))
    def test_narrow_types_are_rounded_once(self, dtype, y_rtol):
        arguments = problem(dtype=dtype)
        got = sharded(8)(*arguments)
        chex.assert_type([got[0][0], got[1][0]], dtype)
        chex.assert_type(jax.tree.leaves(got[0][1]), jnp.float32)
        assert_matches_float64(got, arguments, rtol=1e-5, y_rtol=y_rtol)

    @parameterized.parameters(False, True)
    def test_float64(self, with_shift):
        with jax.enable_x64(True):
            arguments = [
                jnp.asarray(a, None if a.dtype == bool else np.float64)
                for a in problem(empty=2)
            ]
            got = sharded(8, with_shift)(*arguments)
            chex.assert_type(jax.tree.leaves(got), np.float64)
            assert_matches_float64(got, arguments, rtol=1e-10)

    @parameterized.product(
        offset=(1e2, 1e3, 1e4), rows=(1, 8, 300), masked=(False, True)
    )
    def test_variance_of_a_large_mean_from_the_first_step(
        self, offset, rows, masked
    ):
        rng = np.random.default_rng(0)
        x = rng.normal(offset, 1, (8 * rows, CHANNELS)).astype(np.float32)
        keep = np.ones((8 * rows, 1), bool)
        if masked:
            keep = rng.random((8 * rows, 1)) < 0.6
            keep[:rows] = False
        y, batch = normalized_over_devices()(x, keep)
        wide = x.astype(np.float64)
        mean, var = wide.mean(0, where=keep), wide.var(0, where=keep)
        rtol = 1e-5 if offset <= 1e3 else 1e-4
        np.testing.assert_allclose(batch.var, var, rtol=rtol)
        np.testing.assert_allclose(batch.mean, mean, rtol=2e-7)
        want = (wide - mean) / np.sqrt(var + EPSILON)
        np.testing.assert_allclose(y, want, atol=rtol * np.abs(want).max())

    @parameterized.parameters(0.0, 1e4)
    def test_settled_shift_is_as_good(self, offset):
        rng = np.random.default_rng(0)
        x = rng.normal(offset, 1, (64, CHANNELS)).astype(np.float32)
        shift = jnp.full(CHANNELS, offset + 0.5, jnp.float32)
        _, batch = normalized_over_devices()(x, np.ones((64, 1), bool), shift)
        want = x.astype(np.float64).var(0)
        np.testing.assert_allclose(batch.var, want, rtol=1e-6)

    def test_counts_beyond_what_one_float_holds(self):
        # 2^24 + 7 values lose the 7 in float32, and with it the variance.
        counts = np.full(8, 2**21, np.float32)
        counts[0] += 7
        means = np.float32(1e3) + np.arange(8, dtype=np.float32) / 64
        parts = jaxbn.Moments(counts, means[:, None], counts[:, None])
        total = jax.vmap(
            functools.partial(jaxbn.sync, axis_name="i"),
            axis_name="i",
            out_axes=None,
        )(parts)
        n, m = counts.astype(np.float64), means.astype(np.float64)
        mean = np.average(m, weights=n)
        m2 = (n + n * (m - mean) ** 2).sum()
        np.testing.assert_allclose(total.m2, m2, rtol=1e-6)

    @parameterized.product(large=(1e19, 1e30, 1e38), with_shift=(False, True))
    def test_finite_input_never_gives_nan(self, large, with_shift):
        x = np.float32(large) * np.linspace(0.5, 1, 32, dtype=np.float32)
        x = np.stack([x, -x, np.zeros_like(x)], 1)
        shift = jnp.zeros(3) if with_shift else None
        run = normalized_over_devices()
        y, batch = run(x, np.ones((32, 1), bool), shift)
        assert np.isfinite(y).all() and not np.isnan(batch.var).any()
        y, _ = jaxbn.batch_norm(x)
        assert np.isfinite(y).all()

    def test_bad_shift_changes_nothing(self):
        arguments = problem(offset=1e3)
        want = reference.batch_norm(*arguments).var
        (_, batch), _ = sharded(8, with_shift=True)(*arguments)
        np.testing.assert_allclose(batch.var, want, rtol=1e-5)

    def test_shift_that_is_not_finite_is_ignored(self):
        x, *_ = problem()
        x = jnp.nan_to_num(x, posinf=0)
        norm = functools.partial(jaxbn.batch_norm, axis_name="i")
        run = jax.vmap(norm, axis_name="i", out_axes=(0, None))
        want, _ = run(x.reshape(4, 4, 3, CHANNELS))
        norm = functools.partial(
            norm, shift=jnp.array([jnp.nan, jnp.inf, 0, 0, 0])
        )
        run = jax.vmap(norm, axis_name="i", out_axes=(0, None))
        got, _ = run(x.reshape(4, 4, 3, CHANNELS))
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)

    def test_everything_masked_is_finite(self):
        x, scale, bias, _, cotangent = problem()
        x = jnp.nan_to_num(x, posinf=0)
        keep = np.zeros((16, 1, 1), bool)
        out, grads = sharded(8)(
            x, scale, bias, np.broadcast_to(keep, (16, 3, 1)), cotangent
        )
        chex.assert_tree_all_finite((out, grads))
        assert out[1].count == 0

    def test_standardize_takes_the_last_axis_and_has_no_affine(self):
        x, _, _, keep, _ = problem()
        x = jnp.stack([x, 2 * x + 1])
        keep = jnp.stack([keep, keep])
        got = jaxbn.standardize(x, where=keep)
        want = jaxbn.batch_norm(x, where=keep)
        assert got[1].mean.shape == (CHANNELS,)
        chex.assert_trees_all_equal(got, want)

    def test_what_is_constant_has_no_negative_variance(self):
        """Roundings of a difference of squares could leave one."""
        rng = np.random.default_rng(0)
        scale = 10.0 ** rng.integers(-6, 7, 2048)
        value = (scale * rng.normal(size=2048)).astype(np.float32)
        x = np.broadcast_to(value, (7, 9, 2048))
        keep = rng.random((7, 9, 1)) < 0.5

        def over_devices(x, keep):
            local = jaxbn.moments(x, where=keep)
            return jaxbn.sync(local, axis_name="i").m2

        m2 = jax.jit(jax.vmap(over_devices, axis_name="i"))(x, keep)
        assert m2.min() >= 0

    def test_masked_values_change_nothing(self):
        x, scale, bias, keep, cotangent = problem()
        cotangent = cotangent * keep
        other = jnp.where(keep, x, 7.0)
        a = sharded(8)(x, scale, bias, keep, cotangent)
        b = sharded(8)(other, scale, bias, keep, cotangent)
        chex.assert_trees_all_equal(a[0][1], b[0][1])
        chex.assert_trees_all_equal(a[1], b[1])


class ContextTest(parameterized.TestCase):
    def test_vmap_axis(self):
        arguments = problem()
        split = [
            a.reshape(8, 2, *a.shape[1:]) if a.ndim == 3 else a
            for a in arguments
        ]
        run = jax.vmap(
            functools.partial(value_and_grads, axis_name="data"),
            in_axes=(0, None, None, 0, 0),
            out_axes=((0, None), (0, 0, 0)),
            axis_name="data",
        )
        (y, batch), (dx, dscale, dbias) = jax.jit(run)(*split)
        joined = [a.reshape(16, 3, CHANNELS) for a in (y, dx)]
        got = (joined[0], batch), (joined[1], dscale.sum(0), dbias.sum(0))
        assert_matches_float64(got, arguments, rtol=1e-5)

    @parameterized.parameters(AxisType.Auto, AxisType.Explicit)
    def test_global_arrays_under_jit(self, kind):
        arguments = problem()
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        sharding = jax.sharding.NamedSharding(mesh, P("data"))
        run = jax.jit(functools.partial(value_and_grads, axis_name="data"))
        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(a, sharding) if a.ndim == 3 else a
                for a in arguments
            ]
            got = run(*placed)
        assert_matches_float64(got, arguments, rtol=1e-5)

    def test_two_mesh_axes(self):
        arguments = problem()
        mesh = jax.make_mesh(
            (2, 4), ("host", "chip"), axis_types=(AxisType.Auto,) * 2
        )
        parts, whole = P(("host", "chip")), P()
        run = jax.shard_map(
            functools.partial(value_and_grads, axis_name=("host", "chip")),
            mesh=mesh,
            in_specs=(parts, whole, whole, parts, parts),
            out_specs=((parts, whole), (parts, whole, whole)),
        )
        assert_matches_float64(jax.jit(run)(*arguments), arguments, rtol=1e-5)

    def test_unbound_name_beside_another_axis(self):
        message = "'data' is not bound here; the named axes in scope are ['i']"
        run = jax.shard_map(
            lambda x: jaxbn.batch_norm(x, axis_name="data")[0],
            mesh=jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,)),
            in_specs=P("i"),
            out_specs=P("i"),
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            run(jnp.ones((2, 4, 3)))

    def test_forgotten_sync_is_an_error(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        forgotten = jax.shard_map(
            lambda x: jaxbn.moments(x).mean,
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
        with pytest.raises(ValueError, match="replicat"):
            forgotten(jnp.ones((8, 3)))


class ComplexTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        parts = rng.normal(2, 1, (2, 16, 3))
        self.x = (parts[0] + 1j * parts[1]).astype(np.complex64)
        self.keep = rng.random((16, 1)) < 0.7

    @parameterized.parameters(False, True)
    def test_statistics_over_devices(self, with_shift):
        shift = jnp.full(3, 1 + 1j, np.complex64) if with_shift else None
        y, batch = normalized_over_devices()(self.x, self.keep, shift)
        wide = self.x.astype(np.complex128)
        mean = wide.mean(0, where=self.keep)
        var = (np.abs(wide - mean) ** 2).mean(0, where=self.keep)
        assert batch.m2.dtype == np.float32 and y.dtype == np.complex64
        chex.assert_trees_all_close(
            [y, batch.mean, batch.var],
            [(wide - mean) / np.sqrt(var + EPSILON), mean, var],
            rtol=1e-5,
            atol=1e-5,
        )

    def test_derivative_equals_autodiff_of_the_formula(self):
        with jax.enable_x64(True):
            x = jnp.asarray(self.x, np.complex128)
            rng = np.random.default_rng(1)
            ct, turn = rng.normal(size=(2, 16, 3))

            def plain(x):
                mean = x.mean(0)
                var = (jnp.abs(x - mean) ** 2).mean(0)
                return (x - mean) / jnp.sqrt(var + EPSILON)

            def ours(x):
                return jaxbn.standardize(x, epsilon=EPSILON)[0]

            def loss(norm, x):
                return (jnp.sin(norm(x)) * (ct + 1j * turn)).real.sum()

            got, want = (
                (
                    jax.grad(functools.partial(loss, norm))(x),
                    jax.jvp(norm, (x,), (turn + 0.5j * ct,))[1],
                )
                for norm in (ours, plain)
            )
            chex.assert_trees_all_close(got, want, rtol=1e-8, atol=1e-10)
