"""Every variant of the layer, in linen and nnx, against float64."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import RunningStats
from tests.helpers import reference
from tests.helpers.variants import (
    CONTEXTS,
    EPSILON,
    KINDS,
    STEPS,
    C,
    Linen,
    N,
    Nnx,
    assert_running,
    batches,
    in_shard_map,
)

pytestmark = pytest.mark.sample(3)


@pytest.fixture(scope="module")
def data():
    return batches()


def float64_running(x, keep, weights, *, ddof=0, start=(0.0, 1.0)):
    """Statistics as an explicit weighted sum; weights[0] is the start's."""
    mean, var = (np.full(C, weights[0] * value) for value in start)
    for batch, kept, weight in zip(x.astype(np.float64), keep, weights[1:]):
        values = batch[kept[..., 0]]
        mean += weight * values.mean(0)
        var += weight * values.var(0, ddof=ddof)
    return mean, var


def run(layer, x, keep, **call):
    state = layer.init(x[0], **call)
    step = jax.jit(lambda state, x, keep: layer(state, x, mask=keep, **call))
    for batch, kept in zip(x, keep):
        y, state = step(state, batch, kept)
    return y, state


AVERAGES = {
    "ddof": (
        dict(momentum=0.8, running=jaxbn.Running(ddof=1)),
        [0.512, 0.128, 0.16, 0.2],
    ),
    "cumulative": (dict(momentum=None), [0, 1 / 3, 1 / 3, 1 / 3]),
    "debiased": (
        dict(momentum=0.8, running=jaxbn.Running(debias=True)),
        np.array([0, 0.128, 0.16, 0.2]) / 0.488,
    ),
    "debiased slowly": (
        dict(momentum=0.9999, running=jaxbn.Running(debias=True, ddof=1)),
        np.array([0, 0.99980001, 0.9999, 1]) / 2.99970001,
    ),
}


@KINDS
@pytest.mark.parametrize("name", AVERAGES)
def test_averages(kind, name, data):
    options, weights = AVERAGES[name]
    _, state = run(kind(**options), *data)
    running = options.get("running", jaxbn.Running())
    want = float64_running(*data, weights, ddof=running.ddof)
    assert_running(state, want)
    if options["momentum"] is None or running.debias:
        np.testing.assert_array_equal(state["steps"], [STEPS] * C)
    else:
        assert "steps" not in state


def ramp(step):
    """Limits of renormalization that open with the steps taken."""
    return 1 + 0.1 * step, 0.2 * step


@KINDS
@pytest.mark.parametrize("context", CONTEXTS)
def test_all_at_once_in_every_context(kind, context, data):
    """Unbiased, debiased, renormalized on a schedule, masked, with a NaN."""
    x, keep = data
    layer = kind(
        axis_name="data",
        momentum=0.8,
        running=jaxbn.Running(ddof=1, debias=True, skip_nonfinite=True),
        renorm=ramp,
    )
    state = layer.init(x[0])
    step = CONTEXTS[context](lambda state, x, keep: layer(state, x, mask=keep))
    poisoned = x[0].copy()
    poisoned[-1, 0, 1] = np.nan
    seen = keep[0].copy()
    seen[-1, 0] = True
    _, state = step(state, poisoned, seen)
    assert state["skipped"] == 1 and not state["steps"].any()
    for i in range(STEPS):
        weights = np.zeros(1 + i) if i else np.ones(1)
        if i:
            weights[1:] = 0.8 ** np.arange(i)[::-1]
            weights /= weights.sum()
        mean, var = float64_running(x[:i], keep[:i], weights, ddof=1)
        y, state = step(state, x[i], keep[i])
        batch = reference.batch_norm(x[i], 1.0, 0.0, keep[i], x[i])
        (r_max, d_max), sigma = ramp(i), np.sqrt(var + EPSILON)
        r = np.clip(np.sqrt(batch.var + EPSILON) / sigma, 1 / r_max, r_max)
        d = np.clip((batch.mean - mean) / sigma, -d_max, d_max)
        np.testing.assert_allclose(y, batch.y * r + d, atol=1e-4)
    weights = np.array([0, 0.64, 0.8, 1]) / 2.44
    assert_running(state, float64_running(x, keep, weights, ddof=1))
    assert state["skipped"] == 1 and (state["steps"] == STEPS).all()


@KINDS
@pytest.mark.parametrize(
    "options",
    [
        dict(sharing=jaxbn.Scope(group_size=2)),
        dict(sharing=jaxbn.Scope(normalize_over=8)),
        dict(sharing=jaxbn.Scope(num_ids=2)),
    ],
)
def test_averages_under_every_scope(kind, options, data):
    """The running statistics are those of all examples, whoever shares."""
    x, keep = data
    layer = kind(
        axis_name="data",
        momentum=None,
        running=jaxbn.Running(ddof=1),
        **options,
    )
    ids = np.arange(N) % 2
    by_id = options["sharing"].num_ids is not None
    call = dict(ids=ids[:2]) if by_id else {}  # 2 a device
    state = layer.init(x[0][:2], **call)
    step = in_shard_map(
        lambda state, x, keep: layer(state, x, mask=keep, **call)
    )
    for batch, kept in zip(x, keep):
        _, state = step(state, batch, kept)
    third = [0, 1 / 3, 1 / 3, 1 / 3]
    if not call:
        assert_running(state, float64_running(x, keep, third, ddof=1))
        return
    for i in range(2):
        want = float64_running(x[:, ids == i], keep[:, ids == i], third, ddof=1)
        row = {k: state[k][i] for k in ("mean", "var")}
        assert_running(row, want)


@KINDS
def test_an_id_that_is_rare_is_averaged_over_its_own_batches(kind):
    layer = kind(momentum=None, sharing=jaxbn.Scope(num_ids=2))
    x = np.random.default_rng(0).normal(5, 2, (3, 6, C)).astype(np.float32)
    ids = np.array([[0] * 6, [0, 0, 0, 1, 1, 1], [0] * 6])
    state = layer.init(x[0], ids=ids[0])
    for batch, i in zip(x, ids):
        _, state = layer(state, batch, ids=jnp.asarray(i))
    np.testing.assert_array_equal(state["steps"], [[3] * C, [1] * C])
    np.testing.assert_allclose(state["mean"][1], x[1, 3:].mean(0), rtol=1e-5)


@KINDS
def test_frozen_and_not_trained(kind, data):
    x, keep = data
    stats = dict(mean=jnp.full(C, 0.5), var=jnp.full(C, 4.0))
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=x[0].shape).astype(np.float32)

    def gradient(**options):
        layer = kind(**options)
        state = layer.init(x[0]) | stats

        def loss(affine, x):
            y, new = layer(state | affine, x, mask=keep[0])
            return (y * cotangent).sum(), (y, new)

        affine = {"scale": jnp.full(C, 2.0), "bias": jnp.ones(C)}
        (of_affine, dx), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(
            affine, x[0]
        )
        return of_affine, dx, y, new

    affine, dx, y, new = gradient(running=jaxbn.Running(mode="frozen"))
    assert_running(new, tuple(stats.values()))
    np.testing.assert_allclose(y, (x[0] - 0.5) + 1, atol=1e-4)
    np.testing.assert_allclose(dx, cotangent, rtol=1e-5)
    xhat = (x[0] - 0.5) / 2
    np.testing.assert_allclose(
        affine["scale"], (cotangent * xhat).sum((0, 1)), rtol=1e-4
    )
    affine, dx, *_ = gradient(
        running=jaxbn.Running(mode="frozen"), train_affine=False
    )
    assert not affine["scale"].any() and not affine["bias"].any()
    np.testing.assert_allclose(dx, cotangent, rtol=1e-5)
    # The switches are independent of each other.
    affine, dx, y, new = gradient(train_affine=False)
    assert not affine["scale"].any() and (new["mean"] != 0.5).all()
    want = reference.batch_norm(x[0], 2.0, 1.0, keep[0], cotangent)
    np.testing.assert_allclose(dx, want.dx, atol=1e-5)
    affine, dx, y, new = gradient(running=jaxbn.Running(mode="keep"))
    assert_running(new, tuple(stats.values()))
    np.testing.assert_allclose(y, want.y, atol=1e-5)
    assert affine["scale"].all()


@KINDS
def test_frozen_layers_need_not_be_told_the_mode(kind, data):
    x = data[0][0]
    if kind is Linen:
        layer = jaxbn.linen.BatchNorm(running=jaxbn.Running(mode="frozen"))
        y = layer.apply(layer.init(jax.random.key(0), x), x)
    else:
        y = jaxbn.nnx.BatchNorm(
            C, running=jaxbn.Running(mode="frozen"), rngs=nnx.Rngs(0)
        )(x)
    np.testing.assert_allclose(y, x, rtol=1e-4)


@KINDS
def test_statistics_per_timestep_with_sequences_that_end(kind):
    """Cooijmans et al.: a row a timestep, from the sequences still running."""
    rng = np.random.default_rng(0)
    length, rows = 5, 4
    x = rng.normal(1, 2, (length, N, C)).astype(np.float32)
    x += np.arange(length)[:, None, None]  # statistics change over time
    lengths = rng.integers(1, length + 1, N)
    lengths[:3] = length
    layer = kind(
        momentum=0.0,
        running=jaxbn.Running(num_timesteps=rows),
        axis_name="data",
    )
    state = layer.init(x[0], timestep=0)
    assert state["mean"].shape == (rows, C) and state["scale"].shape == (C,)

    def sequence(state, x, lengths):
        def body(state, now):
            t, x = now
            mask = (t < lengths)[:, None]
            y, state = layer(state, x, mask=mask, timestep=t)
            return state, y

        return jax.lax.scan(body, state, (jnp.arange(rows), x[:rows]))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state, y = jax.jit(
        jax.shard_map(
            sequence,
            mesh=mesh,
            in_specs=(P(), P(None, "data"), P("data")),
            out_specs=(P(), P(None, "data")),
        )
    )(state, x, lengths)
    for t in range(rows):
        running = x[t].astype(np.float64)[lengths > t]
        np.testing.assert_allclose(state["mean"][t], running.mean(0), rtol=1e-5)
        np.testing.assert_allclose(state["var"][t], running.var(0), rtol=1e-5)
        want = (x[t] - running.mean(0)) / np.sqrt(running.var(0) + EPSILON)
        np.testing.assert_allclose(y[t], want, atol=1e-5)
        again, _ = layer(state, x[t], train=False, timestep=t)
        np.testing.assert_allclose(again, want, atol=1e-4)
    # Beyond the last row its statistics go on serving.
    late, _ = layer(state, x[4], train=False, timestep=4)
    want = (x[4] - state["mean"][-1]) / np.sqrt(state["var"][-1] + EPSILON)
    np.testing.assert_allclose(late, want, atol=1e-5)


@pytest.mark.parametrize(
    "options, call, message",
    [
        (
            dict(running=jaxbn.Running(num_timesteps=2)),
            {},
            "num_timesteps of the layer and timestep",
        ),
        ({}, dict(timestep=1), "got num_timesteps=None and timestep=1"),
        (
            dict(running=jaxbn.Running(num_timesteps=2)),
            dict(timestep=jnp.zeros(4, int)),
            "timestep must be a scalar integer, for the whole batch; got "
            "int32[4]",
        ),
        (
            dict(
                running=jaxbn.Running(num_timesteps=2),
                sharing=jaxbn.Scope(num_ids=3),
            ),
            dict(timestep=1),
            "num_timesteps=2 and num_ids=3 both add rows to the running "
            "statistics",
        ),
    ],
)
def test_options_that_cannot_be(options, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer = Nnx(**options)
        layer(layer.init(None), jnp.ones((4, C)), train=False, **call)


def test_linen_scans_over_time_with_statistics_per_step():
    """As a recurrent net in flax would write it."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            t, h = carry
            norm = jaxbn.linen.BatchNorm(
                use_running_average=False,
                running=jaxbn.Running(num_timesteps=4),
                momentum=0.0,
            )
            h = nn.tanh(norm(x + h, timestep=t))
            return (t + 1, h), h

    scan = nn.scan(
        Cell,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )()
    x = np.random.default_rng(0).normal(size=(4, 8, C)).astype(np.float32)
    start = jnp.int32(0), jnp.zeros((8, C))
    # Flax cannot make the variables that a scan carries inside of it.
    variables = Cell().init(jax.random.key(0), start, x[0])
    (_, _), updates = scan.apply(variables, start, x, mutable=["batch_stats"])
    (stats,) = updates["batch_stats"].values()
    h = np.zeros((8, C))
    for t in range(4):
        np.testing.assert_allclose(
            stats["mean"][t], (x[t] + h).mean(0), atol=1e-5
        )
        z = x[t] + h
        h = np.tanh((z - z.mean(0)) / np.sqrt(z.var(0) + EPSILON))


def test_renorm_of_the_layer_is_the_function(data):
    x, keep = data
    layer = Linen(renorm=(1.5, 0.3))
    state = layer.init(x[0]) | dict(mean=jnp.ones(C), var=jnp.full(C, 2.0))
    y, _ = layer(state, x[0], mask=keep[0])
    want, _ = jaxbn.batch_renorm(
        x[0],
        running=RunningStats(state["mean"], state["var"]),
        r_max=1.5,
        d_max=0.3,
        where=keep[0],
    )
    np.testing.assert_allclose(y, want, atol=1e-6)
