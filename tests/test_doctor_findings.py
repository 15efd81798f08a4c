"""What the doctor says of one layer, and when it says nothing."""

import contextlib
import io
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import doctor, precise


class Once(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


class Calls(nn.Module):
    """One layer for several inputs, as a discriminator or a Siamese net."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, name="norm"
        )
        parts = np.split(np.arange(len(x)), len(self.scale))
        inputs = zip(parts, self.scale, self.shift)
        return [norm(a * x[rows] + b) for rows, a, b in inputs]


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (10, 64, 4)).astype(np.float32)


def examine(model, batches, *, variables=None, exact=True, **options):
    """With the running statistics of the data, or those given."""
    if variables is None:
        variables = model.init(jax.random.key(0), batches[0], False)
    if exact:
        found = precise.recompute(model, variables, batches).stats
        stats = precise.with_statistics(variables["batch_stats"], found)
        variables = {**variables, "batch_stats": stats}
    report = doctor.examine(
        model, variables, batches, devices=1, quiet=True, **options
    )
    return report, variables


def test_negative_running_variances(batches):
    variables = Once().init(jax.random.key(0), batches[0], False)
    layer = variables["batch_stats"]["norm"]
    layer["var"] = layer["var"].at[1].set(-1.0)
    report, _ = examine(Once(), batches, variables=variables, exact=False)
    (warning,) = report.warnings
    assert warning.startswith("norm has negative running variances")
    np.testing.assert_array_equal(report.layers[0].negative, [0, 1, 0, 0])
    assert "output is not finite" in str(report)


def test_a_variance_below_epsilon_is_a_matter_of_scale(batches):
    small = batches * np.float32(1e-4)
    small[..., 3] = 7e-4  # and one channel that holds one value
    report, _ = examine(Once(), small)
    (layer,) = report.layers
    np.testing.assert_array_equal(layer.dead, [0, 0, 0, 1])
    np.testing.assert_array_equal(layer.below_epsilon, [1, 1, 1, 0])
    text = "\n".join(report.warnings)
    assert "variance below epsilon (75% of its channels)" in text
    least = layer.var[:3].min()
    std = np.sqrt(least / (least + 1e-5))
    assert f"as low as {std:.2g} instead of 1" in text
    assert "norm has dead channels (25% of them)" in text
    assert "prune" in text and "far from 1" not in text


def test_one_value_a_channel(batches):
    class Pooled(Once):
        @nn.compact
        def __call__(self, x, train):
            return Once(name="once")(x.mean(0, keepdims=True), train)

    few = batches[:, :1]
    report, _ = examine(Once(), few)
    (layer,) = report.layers
    assert layer.values == 1 and not layer.dead.any()
    (warning,) = report.warnings
    assert (
        "normalizes a single value per channel, which is its own mean"
        in warning
    )
    # Training returns 0, inference a standardized value.
    assert layer.gap == pytest.approx(1, rel=1e-3)
    report, _ = examine(Pooled(), batches)
    assert report.layers[0].values == 1
    # Of two devices with a value each, where the whole batch has two.
    report = doctor.examine(
        Once(),
        Once().init(jax.random.key(0), few[0], False),
        batches[:, :2],
        devices=2,
        quiet=True,
    )
    assert any(
        "a single value per channel" in warning for warning in report.warnings
    )


def test_calls_on_inputs_that_differ(batches):
    """Real and generated images: each call normalizes with its own."""
    model = Calls((1.0, 0.3), (0.0, -1.0))
    report, variables = examine(model, batches)
    (warning,) = report.warnings
    assert warning.startswith("norm is called 2 times per batch, on inputs")
    assert "num_ids" in warning
    (layer,) = report.layers
    assert layer.calls == 2 and layer.values == 32
    # What the outputs of both calls change by, root mean square.
    squares, count = 0.0, 0
    for x in batches:
        trained, _ = model.apply(variables, x, True, mutable=["batch_stats"])
        inferred = model.apply(variables, x, False)
        for a, b in zip(trained, inferred):
            squares += float(jnp.square(a - b).sum())
            count += a.size
    want = np.sqrt(squares / count)
    assert want > 0.4
    assert layer.gap == pytest.approx(want, rel=1e-3)
    # As training leaves them, which is between the calls: the same finding.
    step = jax.jit(
        lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])[1]
    )
    for x in np.concatenate([batches] * 4):
        variables = {**variables, **step(variables, x)}
    report, _ = examine(model, batches, variables=variables, exact=False)
    assert [w[:30] for w in report.warnings] == [warning[:30]]


@pytest.mark.parametrize("batch_count", [1, 10])
@pytest.mark.parametrize("size", [8, 64])
def test_calls_on_inputs_alike_are_no_finding(batches, batch_count, size):
    model = Calls((1.0, 1.0), (0.0, 0.0))
    report, _ = examine(model, batches[:batch_count, : 2 * size][:, :64])
    assert report.layers[0].calls == 2
    assert not any("called 2 times" in w for w in report.warnings)


def test_scales_that_differ_count_as_well(batches):
    x = batches - batches.mean((0, 1))
    report, _ = examine(Calls((1.0, 0.2), (0.0, 0.0)), x)
    assert report.layers[0].separation > 0.3
    assert report.warnings[0].startswith("norm is called 2 times")


def test_one_cause_is_one_finding(batches):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for i in range(4):
                norm = nn.BatchNorm(
                    use_running_average=not train, momentum=0.9, name=f"n{i}"
                )
                x = norm(nn.Dense(4)(x)) + x
            return x

    model = Deep()
    variables = model.init(jax.random.key(0), batches[0], False)
    step = jax.jit(
        lambda v, x: model.apply(v, x, True, mutable=["batch_stats"])[1]
    )
    for x in batches[:3]:
        variables = {**variables, **step(variables, x)}
    report = doctor.examine(model, variables, batches, devices=8, quiet=True)
    stale, alone, noise = report.warnings
    assert stale.startswith("Every layer (4) has running statistics that have")
    assert alone.startswith("Every layer (4) is not synchronized")
    assert noise.startswith("Every layer (4) normalizes over 8 examples")
    noises = [layer.noise for layer in report.layers]
    assert f"{min(noises):.0%} to {max(noises):.0%}" in noise


def test_it_prints_where_standard_output_goes_now(batches):
    model = Once()
    variables = model.init(jax.random.key(0), batches[0], False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        report = doctor.examine(model, variables, batches[:2])
    assert out.getvalue() == f"{report}\n"
    with contextlib.redirect_stdout(out):
        doctor.examine(model, variables, batches[:2], quiet=True)
    assert out.getvalue() == f"{report}\n"
    # The table explains its columns.
    layers, health, legend, *_ = str(report).split("\n\n")
    for table in (layers, health):
        for column in table.splitlines()[0].split():
            if column not in ("layer", "kind"):
                assert re.search(
                    rf"(^|[ ]){re.escape(column)}[,:]", legend, re.M
                )
    assert all(len(line) <= 80 for line in str(report).splitlines())
