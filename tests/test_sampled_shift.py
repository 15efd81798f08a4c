"""The shift of GPUs: the mean of a sample, about which no sum cancels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import _passes
from jaxbn._reduction import Reduction
from jaxbn.testing import float64_reference

pytestmark = [pytest.mark.optimized, pytest.mark.sample(4)]

SHARE = _passes.LARGEST_SHIFT
CHANNELS = 3


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Has CPUs take the shift from a sample."""
    jax.clear_caches()
    monkeypatch.setattr(_passes, "_about_shift", _passes._about_sample)
    yield
    jax.clear_caches()


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def misleading(shape, level, share):
    """Returns values about level, but 0 for one in share, the first."""
    x = np.random.default_rng(0).normal(level, 1e-3, shape)
    reduction = Reduction(shape, (0, 1, 2))
    part, _, _ = reduction.sample(jnp.zeros(shape), None, share)
    x[tuple(slice(n) for n in part.shape)] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize(
    "size, kept",
    [
        ((32, 32), (2, 32)),
        ((56, 56), (4, 56)),
        ((4, 4), (1, 1)),
        ((7, 7), (1, 4)),
        ((3, 2), (1, 1)),
        ((1, 17), (1, 2)),
        ((1, 3), (1, 1)),
        ((2, 2), (1, 1)),
    ],
)
def test_a_sample_is_at_least_one_value_in_sixteen(size, kept):
    x = jnp.zeros((5, *size, CHANNELS))
    part, values, _ = Reduction(x.shape, (0, 1, 2)).sample(x, None, SHARE)
    assert part.shape == values.shape == (5, *kept, CHANNELS)
    assert part.values * SHARE >= np.prod(size) * 5 or kept == (1, 1)


def test_examples_and_axes_masked_in_part_are_taken_whole():
    x = jnp.zeros((64, 32, 32, CHANNELS))
    reduction = Reduction(x.shape, (0, 1, 2))
    for shape, kept in (
        ((64, 1, 1, 1), (64, 2, 32)),
        ((64, 32, 1, 1), (64, 32, 2)),
        ((1, 32, 32, 1), (64, 32, 32)),
    ):
        where = jnp.ones(shape, bool)
        part, _, _ = reduction.sample(x, where, SHARE)
        assert part.shape[:3] == kept


def test_sharded_axes_are_taken_whole():
    kind = AxisType.Explicit
    with jax.set_mesh(mesh(kind)):
        x = jax.device_put(jnp.zeros((8, 32, 32, CHANNELS)), P(None, "data"))
        part, _, _ = Reduction(x.shape, (0, 1, 2)).sample(x, None, SHARE)
    assert part.shape[:3] == (8, 32, 2)


@pytest.mark.parametrize("shape", [(8, 32, 32, 3), (8, 7, 7, 3), (8, 4, 4, 3)])
@pytest.mark.parametrize("level", [1.0, 1e6])
@pytest.mark.parametrize("share", [SHARE, 64 * SHARE])
def test_a_sample_that_misleads_costs_no_digits(
    as_on_gpus, shape, level, share
):
    x = misleading(shape, level, share)
    wide = x.astype(np.float64)
    got = jax.jit(jaxbn.moments)(x).var
    # XLA's sums on CPUs have rounded more, up to 1e-4; 32 times that counts.
    squares = jax.jit(lambda x: jnp.square(x).sum((0, 1, 2)))(x)
    rounded = np.abs(squares / np.square(wide).sum((0, 1, 2)) - 1).max()
    np.testing.assert_allclose(
        got, wide.var((0, 1, 2)), rtol=1e-5 + 64 * rounded
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
def test_devices_agree_with_float64(as_on_gpus, offset, masked):
    rng = np.random.default_rng(1)
    x = rng.normal(offset, 1, (16, 4, 4, CHANNELS)).astype(np.float32)
    where = np.broadcast_to(rng.random((16, 1, 1, 1)) < 0.6, (16, 1, 1, 1))
    where = where.copy()
    where[:2] = False  # all of the first device
    cotangent = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=(P("data"), P(), P("data")),
    )
    def run(x, where, cotangent):
        def norm(x):
            mask = where if masked else None
            return jaxbn.batch_norm(x, where=mask, axis_name="data")

        y, pull, batch = jax.vjp(norm, x, has_aux=True)
        return y, batch.var, pull(cotangent)[0]

    y, var, dx = run(x, where, cotangent)
    want = float64_reference(
        x, where=where if masked else None, cotangent=cotangent
    )
    np.testing.assert_allclose(var, want.var, rtol=1e-5)
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    np.testing.assert_allclose(dx, want.dx, atol=1e-5)


def test_nan_and_inf_stay_in_their_feature(as_on_gpus):
    x = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = np.nan, np.inf
    got = jax.jit(jaxbn.moments)(x)
    assert np.isnan(got.mean[0]) and not np.isfinite(got.m2[1])
    np.testing.assert_allclose(got.var[2], x[..., 2].var(), rtol=1e-5)


def test_gpus_decide_nothing():
    traced = jax.jit(jaxbn.moments).trace(jnp.zeros((8, 4, 4, 3)))

    def cases(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.case")

    # Two are the choice of the platform, of constants.
    assert cases("cpu") == cases("tpu") == 3
    assert cases("cuda") == cases("rocm") == 2
