"""Why batch norm works: what held for every seed of the longer experiments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from train.why import (
    data,
    devices,
    landscape,
    leakage,
    lstm,
    noise,
    plots,
    recurrent,
    saturation,
    smoothness,
    split,
)
from train.why.data import Settings
from train.why.report import write

SEEDS = (0, 1)


@functools.cache
def digits():
    return data.load_data(Settings())


def batches(steps, size):
    return digits().setting(SEEDS, steps=steps, batch_size=size)


# Leakage.


@functools.cache
def even_or_odd():
    """Of 100 steps."""
    return leakage.prepare(digits(), SEEDS, 4 * devices.EVERY)


@functools.cache
def trained(method):
    return devices.train(even_or_odd(), method=method)


def test_labels_are_balanced_on_every_device():
    found = digits()
    parts = devices.draw(found.train, 50, seed=(0, 0))
    even = found.train[1][parts.indices] % 2 == 0
    assert even.shape == (50, devices.DEVICES, devices.EACH)
    np.testing.assert_array_equal(even.mean(2), 0.5)
    assert 8 < parts.offsets.std() < 12


def test_statistics_per_device_leak():
    alone = trained("per device")
    last = -devices.EVERY
    assert (alone.train[:, last:].mean(1) > 0.97).all()
    assert (alone.test[:, -1] < 0.7).all()
    assert (alone.per_device > 0.97).all() and (alone.shuffled < 0.7).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ("synchronized", "shuffled", "none"))
def test_nothing_leaks_from_common_statistics(method):
    found = trained(method)
    gap = found.train[:, -devices.EVERY :].mean(1) - found.test[:, -1]
    assert (found.test[:, -1] > 0.85).all() and (gap < 0.05).all()


def after_few_steps(method, last, **options):
    return split.train_all(
        batches(4, 64),
        norm=split.METHODS[method].options["norm"],
        last=last,
        num_classes=10,
        **options,
    )


@pytest.mark.parametrize("last", (1, pytest.param(0, marks=pytest.mark.slow)))
def test_an_uneven_shard_moves_flax_alone(last):
    truth = after_few_steps("jaxbn", last, together=True)
    exact = after_few_steps("jaxbn", last)
    assert (split.relative_error(exact.gradient, truth.gradient) < 1e-5).all()
    np.testing.assert_allclose(exact.losses, truth.losses, rtol=1e-4)
    np.testing.assert_allclose(exact.accuracy, truth.accuracy, atol=0.01)
    bent = after_few_steps("flax", last)
    error = split.relative_error(bent.gradient, truth.gradient)
    assert (error > 0.2).all() if last else np.isnan(error).all()


def test_influence_follows_the_devices():
    device = np.arange(devices.SHOWN * devices.EACH) // devices.EACH
    same = device[:, None] == device
    given = trained("per device"), even_or_odd()
    alone = devices.influence("per device", *given)
    assert (alone[~same] == 0).all() and (alone[same] > 0).all()
    together = devices.influence("synchronized", *given)
    assert (together > 0).all()


def test_in_inference_nothing_is_shared():
    given = trained("per device"), even_or_odd()
    matrix = devices.influence("per device", *given, train=False)
    np.testing.assert_array_equal(matrix != 0, np.eye(len(matrix), dtype=bool))


# Smoothness.


def test_ratios_compare_at_step_and_at_loss():
    """Probes are 10, 30 and 20 times as large where they should be found."""

    def probes(losses, measures):
        losses = np.array([losses], np.float32)
        measures = np.array([measures], np.float32)
        return landscape.Probes(losses, np.repeat(measures[..., None], 3, -1))

    count = landscape.LATE[1] // landscape.EVERY
    late = slice(landscape.LATE[0] // landscape.EVERY, count)
    losses = np.full(count, 2.0)
    losses[-landscape.PROBES :] = 0.9
    measures = np.full(count, 3.0)
    measures[0] = 10.0
    measures[late] = 30.0
    measures[-landscape.PROBES :] = 20.0
    without = probes(losses, measures)
    with_ = probes(np.linspace(0.99, 0.1, count), np.ones(count))
    found = landscape.ratios(without, with_)
    want = {"first step": 10, "equal step": 30, "equal loss": 20}
    assert list(found) == list(want)
    for moment, ratio in want.items():
        np.testing.assert_allclose(found[moment], [[ratio] * 3])
    never = probes(np.full(count, 2.0), measures)
    assert np.isnan(landscape.ratios(never, with_)["equal loss"]).all()


def test_noise_is_that_of_algorithm_1():
    zeros, ones = (jnp.full((2000, 400), value) for value in (0.0, 1.0))
    key = jax.random.key(0)
    m = np.asarray(landscape.noise(key, 0, zeros))
    s = np.asarray(landscape.noise(key, 0, ones)) - m
    assert np.abs(m).max() < 0.6 and 0.19 < np.ptp(m, axis=0).min() < 0.2
    assert np.abs(m.mean(0)).max() > 0.48
    np.testing.assert_allclose(m.mean(0).std(), 1 / 12**0.5, rtol=0.1)
    np.testing.assert_allclose(s.std(0).mean(), 0.1, rtol=0.02)
    assert s.mean(0).min() > 0.98 and s.mean(0).max() < 1.27
    np.testing.assert_allclose(s.mean(), 1.125, rtol=0.01)
    other = np.asarray(landscape.noise(key, 1, zeros))
    assert np.abs(other - m).max() > 0.5


# Saturation.


def test_the_limit_is_where_the_slope_is_a_tenth():
    for kind in saturation.KINDS.values():
        slope = jax.grad(kind.activation)
        share = slope(kind.limit) / slope(0.0)
        np.testing.assert_allclose(share, saturation.FLAT, rtol=1e-5)


def test_sigmoids_learn_with_batch_norm_alone():
    setting = batches(300, 64)
    without, with_ = (
        saturation.train(
            setting,
            1.0,
            norm=norm,
            kind="sigmoid",
            ends=(64, 10),
        )
        for norm in (None, jaxbn.batch_norm)
    )
    assert (without.accuracy[:, -1] < 0.25).all()
    assert (with_.accuracy[:, -1] > 0.95).all()
    assert (without.inputs[:, -1, 1] < -1.5).all()
    assert (np.abs(with_.inputs[:, -1, 1]) < 0.7).all()
    assert (with_.slope[:, -1] > 1.5 * without.slope[:, -1]).all()


# Recurrent.


def reference_lstm(params, x, start, *, norm):
    """In float64, a loop over time: logits, and what was normalized."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    seen = []

    def normal(name, h):
        if not norm:
            return h
        mean, var = h.mean(0), h.var(0)
        seen.append((name, mean, var))
        h = (h - mean) / np.sqrt(var + lstm.EPSILON) * p[f"{name}_scale"]
        return h + p.get(f"{name}_bias", 0)

    def sigmoid(h):
        return 1 / (1 + np.exp(-h))

    h, c = start.astype(np.float64), np.zeros(start.shape)
    for t in range(len(x)):
        gates = normal("input", x[t].astype(np.float64) @ p["input"])
        gates = gates + normal("hidden", h @ p["hidden"]) + p["bias"]
        i, f, o, g = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(normal("cell", c))
    return h @ p["head"] + p["head_bias"], seen


@pytest.fixture(scope="module")
def sequence():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 9, 2)).astype(np.float32)
    start = rng.normal(size=(9, lstm.UNITS)).astype(np.float32)
    return x, start


def random_affine(params):
    rng = np.random.default_rng(1)
    return {
        name: rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
        if "scale" in name or "bias" in name
        else value
        for name, value in params.items()
    }


@pytest.mark.parametrize("norm", (True, False))
def test_lstm_is_the_written_out_one(sequence, norm):
    params = random_affine(lstm.init(jax.random.key(0), 2, 3, norm=norm))
    out = lstm.apply(params, *sequence)
    want, seen = reference_lstm(params, *sequence, norm=norm)
    np.testing.assert_allclose(out.logits, want, rtol=2e-4, atol=2e-4)
    assert len(out.moments) == (3 if norm else 0)
    for place, name in enumerate(("input", "hidden", "cell")[: 3 * norm]):
        moments = out.moments[place]
        rows = [(mean, var) for kind, mean, var in seen if kind == name]
        means, variances = map(np.stack, zip(*rows))
        np.testing.assert_allclose(moments.mean, means, rtol=1e-3, atol=1e-4)
        var = jax.vmap(lambda m: m.var)(moments)
        np.testing.assert_allclose(var, variances, rtol=1e-3, atol=1e-5)


def test_lstm_infers_with_the_statistics_of_each_step(sequence):
    """With those of this very batch inference is training."""
    params = random_affine(lstm.init(jax.random.key(0), 2, 3, norm=True))
    out = lstm.apply(params, *sequence)
    each = [
        jaxbn.RunningStats(m.mean, jax.vmap(lambda m: m.var)(m))
        for m in out.moments
    ]
    again = lstm.apply(params, *sequence, statistics=tuple(each))
    np.testing.assert_allclose(again.logits, out.logits, rtol=1e-4, atol=1e-4)
    moved = jax.tree.map(lambda a: jnp.roll(a, 1, 0), tuple(each))
    other = lstm.apply(params, *sequence, statistics=moved)
    assert np.abs(other.logits - out.logits).max() > 0.01


# Figures and results.


def test_steps_are_averaged_without_an_incomplete_rest():
    steps, means = plots.by_steps(np.array([[1.0, 3.0, 5.0, 7.0, 100.0]]), 2)
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_array_equal(means, [[2.0, 6.0]])


def drawn_figure(finding, folder):
    path = write(finding, folder)
    assert path.stat().st_size > 30_000
    assert not [text for text in finding.measured if "nan" in text]
    return finding.numbers


@pytest.mark.slow
def test_leakage(tmp_path):
    found = leakage.EXPERIMENT.run(Settings(seeds=SEEDS))
    numbers = drawn_figure(found, tmp_path)
    assert numbers["holds"].all() and numbers["influence_in_inference"] == 0
    assert (numbers["per device"]["train"] > 0.99).all()
    assert (numbers["per device"]["test"] < 0.65).all()
    for method in ("shuffled", "synchronized"):
        assert (numbers[method]["test"] > 0.93).all(), method


@pytest.mark.slow
def test_split():
    numbers = split.EXPERIMENT.run(Settings(seeds=SEEDS, quick=True)).numbers
    assert numbers["holds"].all()
    assert (numbers["flax"]["test_accuracy"][:, -1] == 0).all()
    assert (numbers["jaxbn"]["test_accuracy"] > 0.9).all()


@pytest.mark.slow
def test_smoothness(tmp_path):
    found = smoothness.EXPERIMENT.run(Settings(seeds=SEEDS))
    numbers = drawn_figure(found, tmp_path)
    ratios = numbers["ratios"]
    assert (ratios["equal loss"][:, 1] > 4).all()
    assert (ratios["first step"] < 0.5).all()  # the other way round
    holds = numbers["holds"]
    for claim in ("equal loss", "noise is harmless", "more shift"):
        assert holds[claim].all(), claim
    for claim in ("first step", "noise stops the plain net"):
        assert not holds[claim].any(), claim
    assert sum("not reproduced" in text for text in found.measured) == 2


@pytest.mark.slow
def test_gradients_of_a_deep_linear_net():
    found = smoothness.linear(data.keys(SEEDS), steps=90)
    assert (found["without"]["cosine"][0] > 0.9).all()
    without, with_ = (
        found[side]["cosine"].mean(2)[..., smoothness.SHOWN]
        for side in ("without", "with")
    )
    assert (with_ < without).all() and (with_[1] < 0.9).all()


@pytest.mark.slow
def test_noise(tmp_path):
    numbers = drawn_figure(
        noise.EXPERIMENT.run(Settings(seeds=SEEDS)), tmp_path
    )
    told = numbers["summary"]
    assert told["holds"].all() and (told["smallest_over_typical"] < 0.6).all()
    for ratio in told["device_over_batch"].values():
        assert (np.abs(ratio - 1) < 0.25).all()
    assert (numbers["without"]["variance"] < 1e-9).all()


@pytest.mark.slow
def test_saturation(tmp_path):
    numbers = drawn_figure(
        saturation.EXPERIMENT.run(Settings(seeds=SEEDS)), tmp_path
    )
    told = numbers["summary"]
    assert told["holds"]["sigmoid"].all() and told["holds"]["slope"].all()
    assert (told["without"]["tanh_saturated"][1] > 0.4).all()
    assert (told["with"]["tanh_saturated"] < 0.15).all()


@pytest.mark.slow
def test_recurrent(tmp_path):
    numbers = drawn_figure(
        recurrent.EXPERIMENT.run(Settings(seeds=SEEDS)), tmp_path
    )
    for claim in ("per step", "small scale"):
        assert numbers["holds"][claim].all(), claim
