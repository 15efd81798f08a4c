"""Layers with a known fault, and what the doctor says of them."""

import functools
import io
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import Moments, convert, doctor, precise
from jaxbn.doctor import _measure


class Net(nn.Module):
    norm: type = jaxbn.linen.BatchNorm
    axis_name: str | None = "data"
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train):
        norm = functools.partial(
            self.norm,
            use_running_average=not train,
            momentum=self.momentum,
            axis_name=self.axis_name,
        )
        x = norm(name="first")(x)
        x = nn.Dense(4, name="dense")(nn.relu(x))
        return norm(name="second")(x).sum(-1)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (12, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def healthy(batches):
    """Variables whose running statistics are those of the data."""
    model = Net()
    variables = model.init(jax.random.key(1), batches[0], train=False)
    moments = functools.partial(jaxbn.linen.batch_moments, model, train=True)
    found = precise.recompute(moments, variables, batches)
    stats = precise.with_statistics(variables["batch_stats"], found.stats)
    return {**variables, "batch_stats": stats}


def examine(variables, batches, *, model=None, devices=1, **options):
    model = model or Net()
    return doctor.examine(
        model, variables, batches, devices=devices, quiet=True, **options
    )


def with_first(variables, **changes):
    stats = variables["batch_stats"]
    first = {**stats["first"], **changes}
    return {**variables, "batch_stats": {**stats, "first": first}}


def test_healthy_layers_have_no_findings(healthy, batches):
    out = io.StringIO()
    report = doctor.examine(Net(), healthy, batches, devices=1, file=out)
    assert report.warnings == [] and report.batches == 12
    text = out.getvalue()
    assert "No problem found." in text and str(report) in text
    first, second = report.layers
    assert (first.path, second.path) == ("first", "second")
    assert first.kind == "jaxbn" and first.axis_name == "data"
    assert first.examples == 64 and first.momentum == 0.9
    wide = batches.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(first.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(first.var, wide.var(0), rtol=1e-5)
    assert first.z.max() < 1e-5 and first.kl.max() < 1e-9
    assert first.gap == pytest.approx(first.noise, rel=1e-4)
    row = next(r for r in text.splitlines() if r.startswith("first"))
    assert row.split()[:5] == ["first", "jaxbn", "data", "64", "1"]


def test_z_and_kl_are_what_they_say(healthy, batches):
    mean, var = np.array([2.5, 2, 0]), np.array([9.0, 18, 4])
    changed = with_first(healthy, mean=jnp.float32(mean), var=jnp.float32(var))
    layer = examine(changed, batches).layers[0]
    wide = batches.reshape(-1, 3).astype(np.float64)
    m, v = wide.mean(0), wide.var(0) + 1e-5
    np.testing.assert_allclose(layer.z, abs(mean - m) / np.sqrt(v), rtol=1e-4)
    # The divergence of two normal distributions, by quadrature.
    grid = np.linspace(-60, 60, 200_001)[:, None]
    log_p = -((grid - m) ** 2) / (2 * v) - np.log(v) / 2
    log_q = -((grid - mean) ** 2) / (2 * (var + 1e-5)) - np.log(var + 1e-5) / 2
    p = np.exp(log_p) / np.sqrt(2 * np.pi)
    kl = (p * (log_p - log_q)).sum(0) * (grid[1] - grid[0])
    np.testing.assert_allclose(layer.kl, kl, rtol=1e-4)


def test_the_gap_is_what_the_outputs_differ_by(healthy, batches):
    changed = with_first(healthy, mean=jnp.zeros(3), var=jnp.full(3, 4.0))
    report = examine(changed, batches)
    layer = jaxbn.linen.BatchNorm(use_scale=False, use_bias=False)
    stats = {"batch_stats": changed["batch_stats"]["first"]}
    squares, model_squares, size = 0, 0, 0
    for x in batches:
        y, _ = layer.apply(stats, x, False, mutable=["batch_stats"])
        squares += np.square(y - layer.apply(stats, x, True)).mean()
        out, _ = Net().apply(changed, x, train=True, mutable=["batch_stats"])
        gap = out - Net().apply(changed, x, train=False)
        model_squares += np.square(gap).sum()
        size += np.square(out).sum()
    got = report.layers[0].gap
    assert got == pytest.approx(np.sqrt(squares / len(batches)), rel=1e-3)
    assert report.gap == pytest.approx(np.sqrt(model_squares / size), rel=1e-3)


def test_averages_that_have_not_converged(healthy, batches):
    stats = healthy["batch_stats"]["first"]
    left = 0.9**10
    changed = with_first(
        healthy,
        mean=(1 - left) * stats["mean"],
        var=(1 - left) * stats["var"] + left,
    )
    (warning,) = examine(changed, batches).warnings
    assert warning.startswith("first has running statistics that have not conv")
    assert (
        "the initial value still has a weight of about 35%, as after 10 steps"
        in warning
    )
    assert "jaxbn.precise.recompute" in warning


def test_statistics_that_were_never_updated(healthy, batches):
    changed = with_first(healthy, mean=jnp.zeros(3), var=jnp.ones(3))
    (warning,) = examine(changed, batches).warnings
    assert "still has its initial running statistics" in warning


def test_statistics_of_other_data(healthy, batches):
    stats = healthy["batch_stats"]["first"]
    changed = with_first(healthy, mean=stats["mean"] + jnp.array([0, 3.0, -3]))
    (warning,) = examine(changed, batches).warnings
    assert "do not match this data" in warning


def test_the_noise_of_an_average_is_no_finding(healthy, batches):
    """Statistics that training itself left, with momentum 0.9."""
    variables = healthy
    step = jax.jit(
        lambda v, x: Net().apply(v, x, train=True, mutable=["batch_stats"])[1]
    )
    for x in np.concatenate([batches] * 4):
        variables = {**variables, **step(variables, x)}
    report = examine(variables, batches)
    assert report.warnings == [] and report.layers[0].z.max() > 1e-3


def test_layers_that_are_not_synchronized(healthy, batches):
    alone = Net(axis_name=None)
    report = examine(healthy, batches, model=alone, devices=4)
    (warning,) = report.warnings
    assert warning.startswith(
        "Every layer (2) is not synchronized: without axis"
    )
    assert "each of the 4 devices" in warning and 'axis_name="data"' in warning
    assert report.layers[0].examples == 16
    assert " no " in str(report).splitlines()[1]
    assert examine(healthy, batches, devices=4).layers[0].examples == 64


@pytest.mark.parametrize(
    "options, examples",
    [
        (dict(sharing=jaxbn.Scope(group_size=2)), 16),
        (dict(sharing=jaxbn.Scope(normalize_over=8)), 8),
        (dict(axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]), 32),
        (dict(sharing=jaxbn.Scope(normalize_over=2), axis_name=None), 2),
    ],
)
def test_over_how_many_examples(options, examples, batches):
    layer = jaxbn.linen.BatchNorm(**{"axis_name": "data", **options})
    variables = layer.init(jax.random.key(0), batches[0], False)
    report = examine(variables, batches, model=layer, devices=8)
    assert report.layers[0].examples == examples
    whole = examine(variables, batches, model=jaxbn.linen.BatchNorm())
    assert report.layers[0].noise == pytest.approx(
        whole.layers[0].noise * np.sqrt(64 / examples), rel=1e-3
    )
    few = any(f"over {examples} examples" in w for w in report.warnings)
    assert few == (examples < 16)


def test_ids_share_the_examples_of_a_batch(batches):
    ids = np.arange(64) % 8

    def call(layer, x, train):
        return layer(x, not train, ids=ids)

    options = dict(axis_name="data", sharing=jaxbn.Scope(num_ids=8))
    layer = jaxbn.linen.BatchNorm(**options)
    variables = layer.init(jax.random.key(0), batches[0], False, ids=ids)
    report = examine(variables, batches, model=layer, call=call, devices=2)
    (health,) = report.layers
    assert health.examples == health.values == 8
    # Means and standard deviations of eight examples, in float64.
    parts = np.float64(batches).reshape(len(batches), 8, 8, 3)  # as by id
    mean, std = parts.mean(1), parts.std(1)
    center, whole = mean.mean(0), parts.var((0, 1))
    whole = np.sqrt(whole)
    gaps = ((mean - center) / whole) ** 2 + (1 - std / whole) ** 2
    assert health.noise == pytest.approx(np.sqrt(gaps.mean()), rel=1e-3)
    assert any("normalizes over 8 examples" in w for w in report.warnings)


def test_examples_are_counted_along_most_arrays(healthy, batches):
    def call(model, batch, train):
        return model(batch["x"], train=train)

    dicts = [
        dict(anchors=np.ones((3, 4)), x=x, y=np.zeros(64)) for x in batches
    ]
    report = examine(healthy, dicts, call=call)
    assert [layer.examples for layer in report.layers] == [64, 64]


def test_a_batch_without_examples(healthy):
    def call(model, key, train):
        return model(jax.random.normal(key, (8, 3)), train=train)

    with pytest.raises(ValueError, match="no array with an axis of examples"):
        examine(healthy, [jax.random.key(0)], call=call)


def test_channels_in_trouble(healthy, batches):
    x = batches * np.array([1, 0, 1e7], np.float32)
    params = {**healthy["params"], "first": {**healthy["params"]["first"]}}
    params["first"]["scale"] = jnp.array([1e-5, 1.0, 1.0])
    params["second"] = {**params["second"], "scale": jnp.zeros(4)}
    report = examine({**healthy, "params": params}, x)
    first = report.layers[0]
    np.testing.assert_array_equal(first.dead, [False, True, False])
    np.testing.assert_array_equal(first.exploding, [False, False, True])
    np.testing.assert_array_equal(first.zero_scale, [True, False, False])
    text = "\n".join(report.warnings)
    assert "first has dead channels" in text
    assert "first has channels with magnitudes above 1e6" in text
    assert "first has an input of standard deviation " in text
    assert "second has a scale near zero in all channels" in text


def test_poisoned_statistics(healthy, batches):
    mean = healthy["batch_stats"]["first"]["mean"].at[1].set(jnp.nan)
    report = examine(with_first(healthy, mean=mean), batches)
    (warning,) = [w for w in report.warnings if w.startswith("first")]
    assert "nonfinite running statistics" in warning
    assert "skip_nonfinite=True" in warning


def test_flax_layers_are_examined_too(healthy, batches):
    report = examine(healthy, batches, model=Net(norm=nn.BatchNorm))
    assert [layer.kind for layer in report.layers] == ["flax", "flax"]
    ours = examine(healthy, batches)
    for a, b in zip(report.layers, ours.layers):
        np.testing.assert_allclose(a.var, b.var, rtol=1e-6)
    assert report.warnings == []


def test_converted_models_are_seen_as_they_run(healthy, batches):
    model = Net(norm=nn.BatchNorm, axis_name=None)
    model = convert.to_jaxbn(model, axis_name="data")
    report = examine(healthy, batches, model=model, devices=8)
    assert [layer.kind for layer in report.layers] == ["jaxbn", "jaxbn"]
    assert [layer.axis_name for layer in report.layers] == ["data", "data"]


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_nnx_models(norm, batches):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), norm(4, rngs=rngs), nnx.relu
    )
    model.eval()
    report = doctor.examine(model, None, batches, devices=1, quiet=True)
    (layer,) = report.layers
    assert layer.path == "layers/1"
    assert layer.kind == norm.__module__.split(".")[0]
    wide = np.concatenate([model.layers[0](x) for x in batches])
    np.testing.assert_allclose(layer.mean, wide.mean(0), atol=1e-4)
    assert model.layers[1].use_running_average  # the model is as it was
    assert not model.layers[1].mean[...].any()
    assert "still has its initial running statistics" in "".join(
        report.warnings
    )


def test_frozen_layers_are_compared_with_the_data_too(healthy, batches):
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return jaxbn.linen.BatchNorm(
                running=jaxbn.Running(mode="frozen"),
                axis_name="data",
                name="first",
            )(x)

    variables = {
        name: {"first": healthy[name]["first"]}
        for name in ("params", "batch_stats")
    }
    report = examine(variables, batches, model=Frozen())
    assert report.layers[0].z.max() < 1e-5


def test_noise_is_the_spread_of_batch_means():
    """For one value of many batches: a closed form."""
    rng = np.random.default_rng(0)
    one, zero = np.ones(1), np.zeros(1)
    parts = [
        (
            Moments(50 * one, m * one, 50 * 4 * one),
            Moments(one, m * one, zero),
            Moments(one, np.sqrt(4 + 1e-5) * one, zero),
        )
        for m in rng.normal(1, 0.1, 4000)
    ]
    found = _measure.measure(parts, 0.9)
    assert found["mean_noise"][0] == pytest.approx(
        0.05 * np.sqrt(0.1 / 1.9), rel=0.05
    )
    assert found["var"][0] == pytest.approx(4.01, rel=1e-2)
    got = _measure.gap(parts, found["mean"], found["var"], 1e-5)
    assert got == pytest.approx(0.05, rel=0.05)


def test_models_the_doctor_cannot_call(healthy, batches):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            return jaxbn.linen.BatchNorm(use_running_average=mode == "test")(x)

    model = Odd()
    variables = model.init(jax.random.key(0), batches[0], "test")
    message = "deterministic, eval, inference; it takes (x, mode)."
    with pytest.raises(ValueError, match=re.escape(message)):
        examine(variables, batches, model=model)

    def call(model, batch, train):
        return model(batch, "train" if train else "test")

    report = examine(variables, batches, model=model, call=call)
    assert report.layers[0].path == "BatchNorm_0"
    with pytest.raises(
        ValueError, match="batches is empty; at least one is needed"
    ):
        examine(healthy, [])
    dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="there is no batch norm layer of flax or"
    ):
        examine(None, batches, model=dense)
    with pytest.raises(ValueError, match="or flax.nnx module; got <lambda>"):
        examine(None, batches, model=lambda x: x)
