"""Sums about a shift, and when they are taken again about the mean."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._passes import Passes, centered_moments

pytestmark = [pytest.mark.optimized, pytest.mark.sample(2)]

CHANNELS = 4
WHOLE = P()


def draw(*shape, offset=0.0, scale=1.0):
    rng = np.random.default_rng(0)
    return (scale * rng.normal(offset, 1, shape)).astype(np.float32)


def relative_error(got, x, epsilon=0.0):
    """Of the variance, the worst of all features."""
    true = x.astype(np.float64).var(0) + epsilon
    got = np.asarray(got, np.float64) + epsilon
    return np.abs(got / true - 1).max()


@functools.cache
def on_devices(shift_spec=WHOLE):
    """Moments over eight devices."""
    return jax.jit(
        jax.shard_map(
            lambda x, shift: jaxbn.batch_norm(
                x, axis_name="data", shift=shift, epsilon=0.0
            )[1],
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"), shift_spec),
            out_specs=P(),
        )
    )


class Counted:
    """Sums over the first axis that count how often they run."""

    def __init__(self):
        self.passes = 0

    def __call__(self, x, _, shift):
        d = x - shift
        jax.debug.callback(self._count, d[0, 0])  # once for each row of vmap
        return np.float32(len(x)), d.sum(0), jnp.square(d).sum(0)

    def _count(self, _):
        self.passes += 1


def no_sample(x, _):
    """For where the shift is that which is given."""
    return np.float32(len(x)), x.sum(0)


def passes(x, shift, *, epsilon=0.0, run=lambda fn, *args: jax.jit(fn)(*args)):
    counted = Counted()
    fn = functools.partial(
        centered_moments, Passes(counted, no_sample, epsilon=epsilon)
    )
    found = run(lambda x, shift: fn(x, None, shift), x, jnp.asarray(shift))
    jax.block_until_ready(found)
    jax.effects_barrier()
    return counted.passes, found


class PassesTest(parameterized.TestCase):
    @parameterized.parameters(
        (0.0, 1),  # at the mean
        (3.8, 1),  # below four standard deviations
        (4.2, 2),  # above
        (1e3, 2),
        (1e5, 2),
    )
    def test_one_is_enough_near_the_mean(self, distance, want):
        x = draw(512, CHANNELS, offset=distance)
        count, found = passes(x, np.zeros(CHANNELS, np.float32))
        assert count == want
        # About the mean in the end, or about the shift that was given.
        assert (found.shift == 0).all() == (want == 1)

    def test_epsilon_hides_lost_digits(self):
        x = draw(512, CHANNELS, offset=10.0, scale=1e-4)
        zero = np.zeros(CHANNELS, np.float32)
        assert passes(x, zero)[0] == 2
        assert passes(x, zero, epsilon=1e-5)[0] == 1

    def test_what_is_constant_needs_no_third(self):
        x = np.broadcast_to(draw(1, CHANNELS, offset=3.0), (512, CHANNELS))
        assert passes(x, np.zeros(CHANNELS, np.float32), epsilon=1e-5)[0] == 2

    def test_what_is_as_near_as_x_is_known_needs_no_second(self):
        shift = np.full(CHANNELS, 3.0, np.float32)
        x = np.full((512, CHANNELS), np.nextafter(np.float32(3), 4))
        assert passes(x, shift)[0] == 1

    def test_nan_needs_no_second(self):
        x = draw(512, CHANNELS, offset=1e3)
        x[0] = np.nan
        assert passes(x, np.zeros(CHANNELS, np.float32))[0] == 1

    def test_under_vmap_each_row_takes_what_it_needs(self):
        """Both passes run there, as JAX documents of a conditional."""

        def run(fn, x, shift):
            return jax.jit(jax.vmap(fn, in_axes=(0, None)))(x, shift)

        zero = np.zeros(CHANNELS, np.float32)
        x = draw(3, 512, CHANNELS)
        x[1] += 100
        count, found = passes(x, zero, run=run)
        assert count == 2 * 3
        for i in range(3):
            assert relative_error(found.m2[i] / 512, x[i]) < 1e-6
        chex.assert_trees_all_equal(found.shift[0], zero)

    def test_one_under_vmap_over_the_axis_of_the_statistics(self):
        """What all rows share is not mapped: there is one conditional."""
        norm = functools.partial(jaxbn.batch_norm, axis_name="i")
        run = jax.vmap(norm, axis_name="i", out_axes=(0, None))
        program = jax.jit(run).lower(draw(3, 8, CHANNELS)).compile().as_text()
        assert program.count(" conditional(") == 1


class ErrorTest(parameterized.TestCase):
    @parameterized.parameters(
        # mean in standard deviations, error allowed
        (0.0, 1e-6),
        (3.9, 1e-5),
        (4.1, 1e-5),
        (1e3, 1e-5),
        (1e4, 1e-4),
        (1e5, 1e-3),
    )
    def test_of_the_first_step(self, offset, rtol):
        zero = np.zeros(CHANNELS, np.float32)
        for rows in (2, 64, 4096):
            x = draw(8 * rows, CHANNELS, offset=offset)
            batch = on_devices()(x, zero)
            assert relative_error(batch.var, x) < rtol
            alone = jaxbn.batch_norm(x, epsilon=0.0)[1]
            assert relative_error(alone.var, x) < rtol

    @parameterized.product(
        offset=(0.0, 1e2, 1e5), distance=(-1e4, -3.9, 0.5, 3.9, 5.0, np.nan)
    )
    def test_of_any_shift(self, offset, distance):
        x = draw(512, CHANNELS, offset=offset)
        shift = np.full(CHANNELS, offset + distance, np.float32)
        batch = on_devices()(x, shift)
        rtol = 1e-3 if offset == 1e5 else 1e-5
        assert relative_error(batch.var, x) < rtol
        np.testing.assert_allclose(
            batch.mean, x.astype(np.float64).mean(0), rtol=2e-7, atol=1e-6
        )

    @parameterized.parameters(1e-15, 1e-8, 1e8, 1e15)
    def test_of_any_unit(self, scale):
        x = draw(512, CHANNELS, offset=2.0, scale=scale)
        batch = on_devices()(x, np.zeros(CHANNELS, np.float32))
        assert relative_error(batch.var, x) < 1e-5
        y, _ = jaxbn.batch_norm(x, epsilon=0.0)
        want = (x - x.mean(0, np.float64)) / x.std(0, dtype=np.float64)
        np.testing.assert_allclose(y, want, atol=1e-5)

    def test_squares_about_the_shift_may_overflow(self):
        """Those about the mean then count, if they do not."""
        x = draw(512, CHANNELS, offset=1e3, scale=1e17)  # squares of 1e40
        batch = on_devices()(x, np.zeros(CHANNELS, np.float32))
        assert relative_error(batch.var, x) < 1e-5

    @parameterized.parameters(False, True)
    def test_of_counts_beyond_what_one_float_holds(self, uneven):
        counts = np.full(8, 4_000_001.0)
        if uneven:
            counts[:3] = 5, 77, 1001
        rng = np.random.default_rng(0)
        means = rng.normal(1e3, 1, (8, 1))
        parts = jaxbn.Moments(
            *(
                np.asarray(a, np.float32)
                for a in (counts, means, counts[:, None])
            )
        )
        sync = functools.partial(jaxbn.sync, axis_name="i")
        total = jax.vmap(sync, axis_name="i", out_axes=None)(parts)
        n, means = counts[:, None], np.float64(parts.mean)
        mean = (n * means).sum(0) / n.sum()
        m2 = (n + n * np.square(means - mean)).sum(0)
        np.testing.assert_allclose(total.m2, m2, rtol=1e-5)
        chex.assert_trees_all_close(
            jaxbn.merge(
                *(jaxbn.Moments(*(a[i] for a in parts)) for i in range(8))
            ).m2,
            m2,
            rtol=1e-5,
        )


def test_a_shift_that_devices_do_not_share_is_left_out():
    x = draw(512, CHANNELS)
    shift = np.arange(8 * CHANNELS, dtype=np.float32)
    batch = on_devices(shift_spec=P("data"))(x, shift)
    assert relative_error(batch.var, x) < 1e-6


@pytest.mark.parametrize("offset", (0.0, 1e3))
def test_derivatives_of_moments(offset):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, direction, ct_mean, ct_m2 = rng.normal(size=(4, 12, 3))
        x = x + offset

        def ours(x):
            found = jaxbn.moments(x)
            return (found.mean * ct_mean + jnp.sin(found.m2) * ct_m2).sum()

        def plain(x):
            m2 = jnp.square(x - x.mean(0)).sum(0)
            return (x.mean(0) * ct_mean + jnp.sin(m2) * ct_m2).sum()

        def kinds(f):
            hvp = jax.jvp(jax.grad(f), (x,), (direction,))
            return *hvp, jax.grad(lambda x: (jax.grad(f)(x) * direction).sum())(
                x
            )

        chex.assert_trees_all_close(kinds(ours), kinds(plain), rtol=1e-8)


def test_hessian_of_a_channel_without_variance():
    """A maximum with 0 would halve it."""
    hessian = jax.hessian(lambda x: jaxbn.moments(x).m2.sum())(
        jnp.zeros((3, 1))
    )
    want = 2 * (np.eye(3) - 1 / 3)
    np.testing.assert_allclose(hessian.reshape(3, 3), want, atol=1e-6)


def test_a_constant_has_no_negative_variance():
    """Its sums round, and epsilon hides the digits that they cost."""
    constants = np.linspace(1e-3, 1e-2, 64, dtype=np.float32)
    x = np.broadcast_to(constants, (1000, 64))
    _, batch = jaxbn.batch_norm(x, epsilon=1e-5)
    assert (np.asarray(batch.m2) >= 0).all()
    np.testing.assert_allclose(batch.mean, constants, rtol=1e-5)
