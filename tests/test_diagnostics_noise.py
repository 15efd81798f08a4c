"""What companions add to logits, and which example reaches which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import diagnostics


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def centered(params, batch_stats, x, *, train):
    """Less the mean of the batch, or the running mean: two logits."""
    return x - (x.mean(0) if train else batch_stats)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    probes = rng.normal(size=(5, 2))
    pool = rng.normal([0.5, -0.2], [1, 2], size=(12, 2))
    return probes, pool, np.array([0.6, -0.8])


@functools.cache
def noise_of(batch_size, draws, chunk_size):
    return jax.jit(
        functools.partial(
            diagnostics.companion_noise,
            centered,
            batch_size=batch_size,
            draws=draws,
            chunk_size=chunk_size,
        )
    )


def test_companions_of_the_whole_pool_are_no_noise(examples):
    probes, pool, running = examples
    run = noise_of(13, 3, 1)
    got = run({}, running, probes, pool, key=jax.random.key(0))
    z = probes - running
    drawn = probes - (probes + pool.sum(0)) / 13
    assert got.variance.max() < 1e-25
    np.testing.assert_allclose(
        got.squared_bias, ((drawn - z) ** 2).mean(1), rtol=1e-10
    )
    flips = (drawn.argmax(1) != z.argmax(1)).mean()
    assert abs(got.flips - flips) < 1e-15 and 0 < flips < 1


@pytest.mark.parametrize("batch_size", [2, 10])
def test_noise_of_companions_is_that_of_sampling(examples, batch_size):
    """A sum of k of P without replacement: variance k S^2 (1 - k / P)."""
    probes, pool, running = examples
    draws, k = 2000, batch_size - 1
    run = noise_of(batch_size, draws, draws)
    got = run({}, running, probes, pool, key=jax.random.key(0))
    sums = k * pool.var(0, ddof=1) * (1 - k / len(pool))
    variance = (sums / batch_size**2).mean()
    np.testing.assert_allclose(got.variance, np.full(5, variance), rtol=0.1)
    drawn = probes - (probes + k * pool.mean(0)) / batch_size
    bias = drawn - (probes - running)
    error = 4 * np.sqrt(variance / draws)
    np.testing.assert_allclose(
        got.squared_bias,
        (bias**2).mean(1),
        atol=2 * error * np.abs(bias).max() + error**2,
    )


def test_noise_is_unbiased_and_repeatable(examples):
    """Few draws many times: means as of many draws, whatever chunk_size is."""
    probes, pool, running = examples
    args = {}, running, probes, pool

    @jax.jit
    def repeated(keys):
        def run(key):
            return diagnostics.companion_noise(
                centered, *args, batch_size=4, draws=2, key=key, chunk_size=2
            )

        return jax.vmap(run)(keys)

    found = repeated(jax.random.split(jax.random.key(1), 1500))
    want = pool.var(0, ddof=1) * 3 * (1 - 3 / 12) / 16
    np.testing.assert_allclose(found.variance.mean(0), want.mean(), rtol=0.1)
    drawn = probes - (probes + 3 * pool.mean(0)) / 4
    bias = ((drawn - (probes - running)) ** 2).mean(1)
    # With the noise of the mean left in, half the variance would be too much.
    np.testing.assert_allclose(
        found.squared_bias.mean(0), bias, atol=want.mean() / 10
    )
    one, seven = (
        noise_of(4, 11, n)(*args, key=jax.random.key(2)) for n in (1, 7)
    )
    np.testing.assert_allclose(one.variance, seven.variance, rtol=1e-12)
    assert one.flips == seven.flips


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def layered(axis_name, sharded):
    """(params, batch_stats, x) -> logits of two layers under batch norm."""

    def local(params, stats, x, train):
        for w, (mean, var) in zip(params, stats):
            x = x @ w
            if train:
                x, _ = jaxbn.batch_norm(x, axis_name=axis_name)
            else:
                x = jaxbn.normalize(x, mean, var)
            x = jnp.tanh(x)
        return x

    def apply(params, stats, x, *, train):
        fn = functools.partial(local, train=train)
        if sharded:
            specs = P(), P(), P("data")
            fn = jax.shard_map(
                fn, mesh=mesh(), in_specs=specs, out_specs=P("data")
            )
        return fn(params, stats, x)

    return apply


@functools.cache
def influence_of(axis_name=None, sharded=False, train=True):
    return jax.jit(
        functools.partial(
            diagnostics.influence,
            layered(axis_name, sharded),
            train=train,
            chunk_size=8,
        )
    )


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(3)
    params = [rng.normal(size=(4, 6)), rng.normal(size=(6, 3))]
    stats = [(rng.normal(size=c), 1 + rng.random(c)) for c in (6, 3)]
    return params, stats, rng.normal(size=(32, 4))


def test_influence_is_the_derivative_of_batch_norm():
    """d yhat_i / d y_j = (delta_ij - 1 / m - yhat_i yhat_j / m) / s."""

    def apply(params, batch_stats, x, *, train):
        y, _ = jaxbn.batch_norm(x.reshape(7, -1), epsilon=0.1)
        return y * weight[:, None]  # so that the matrix is not symmetric

    x = np.random.default_rng(0).normal(3, 2, (7, 2, 2))
    weight = np.arange(1.0, 8)
    got = jax.jit(functools.partial(diagnostics.influence, apply))({}, {}, x)
    y = x.reshape(7, 4)
    s = np.sqrt(y.var(0) + 0.1)
    h = (y - y.mean(0)) / s
    pairs = np.einsum("ic,jc->ijc", h, h)
    jacobian = (np.eye(7)[..., None] - 1 / 7 - pairs / 7) / s
    want = weight[:, None] * np.sqrt((jacobian**2).sum(-1))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_influence_shows_who_is_normalized_together(network):
    same = np.equal.outer(np.arange(32), np.arange(32))
    device = np.equal.outer(np.arange(32) // 4, np.arange(32) // 4)

    alone = np.asarray(influence_of(None, True)(*network))
    assert not alone[~device].any() and (alone[device] > 1e-3).all()

    synced = np.asarray(influence_of("data", True)(*network))
    assert (synced > 1e-6).all()
    np.testing.assert_allclose(
        synced, influence_of()(*network), rtol=1e-9, atol=1e-12
    )

    running = np.asarray(influence_of("data", True, False)(*network))
    assert not running[~same].any() and (running[same] > 0).all()


def noise(**options):
    options = (
        dict(
            probes=np.ones((2, 3)),
            pool=np.ones((4, 3)),
            batch_size=4,
            draws=3,
            key=jax.random.key(0),
            apply=centered,
        )
        | options
    )
    return lambda: diagnostics.companion_noise(
        options.pop("apply"), {}, 0.0, **options
    )


def reached(apply=centered, x=(4, 3), dtype=float, **options):
    return lambda: diagnostics.influence(
        apply, {}, 0.0, np.ones(x, dtype), **options
    )


def pair(*args, train):
    return jnp.ones((4, 3)), {}


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            noise(pool=np.ones((4, 2))),
            r"of equal shape; got float64\[2, 3\] and",
        ),
        (noise(batch_size=6), "from 2 to 5, .* pool of 4; got 6"),
        (noise(batch_size=1), "from 2 to 5, .*; got 1"),
        (noise(draws=1), "draws must be at least 2 .*; got 1 and 1"),
        (noise(chunk_size=0), "chunk_size at least 1; got 3 and 0"),
        (noise(apply=pair), r"alone, .* got \(float64\[4, 3\], dict\)"),
        (reached(dtype=int), r"x must be floating or complex; got int64"),
        (reached(chunk_size=0), "chunk_size must be at least 1; got 0"),
        (reached(x=(4,)), r"logits \(B, C\).*got float64\[4\]"),
        (
            reached(lambda *args, train: jnp.ones((3, 2))),
            r"for x float64\[4, 3\]; got float64\[3, 2\]",
        ),
    ],
)
def test_errors(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()
