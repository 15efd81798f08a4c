"""One way to call a model: precise, the doctor and the certificate alike."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert, doctor, precise
from jaxbn.testing import assert_shard_invariant

pytestmark = pytest.mark.sample(2)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (3, 16, 4)).astype(np.float32)


def norm(train, **options):
    options = {"axis_name": "data", "name": "norm", **options}
    return jaxbn.linen.BatchNorm(use_running_average=not train, **options)


def check(model, variables, batches, *, certify=True, **options):
    """Holds all tools to the mean and variance of the batches."""
    found = precise.recompute(model, variables, batches, **options)
    report = doctor.examine(
        model, variables, batches, quiet=True, devices=1, **options
    )
    parts = [
        batch["x"] if isinstance(batch, dict) else batch for batch in batches
    ]
    wide = np.concatenate(parts).astype(np.float64)
    (layer,) = report.layers
    for mean, var in (
        (found.stats["norm"].mean, found.stats["norm"].var),
        (layer.mean, layer.var),
    ):
        np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-5)
        np.testing.assert_allclose(var, wide.var(0), rtol=1e-5)
    if certify:
        assert_shard_invariant(
            model, variables, batches[0], devices=[2], **options
        )
    return report


# flax.linen


class Field(nn.Module):
    training: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(norm(self.training)(x))


class Argument(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        return nn.Dense(2)(norm(not deterministic)(x))


class OtherField(nn.Module):
    phase: str = "test"

    @nn.compact
    def __call__(self, x):
        return norm(self.phase == "train")(x)


@pytest.mark.parametrize("model", [Field(), Argument()])
def test_the_mode_is_found_by_its_name(model, batches):
    variables = model.init(jax.random.key(0), batches[0])
    report = check(model, variables, batches, certify=model == Field())
    assert report.gap > 0.1


def test_a_field_of_another_name(batches):
    def call(model, batch, train):
        phase = "train" if train else "test"
        return model.clone(phase=phase, parent=model.scope)(batch)

    model = OtherField()
    variables = model.init(jax.random.key(0), batches[0])
    check(model, variables, batches, certify=False, call=call)
    # jaxbn's own functions take it as well, for a model of jaxbn's.
    found = jaxbn.linen.batch_moments(model, variables, batches[0], call=call)
    np.testing.assert_allclose(
        found["norm"].mean, batches[0].mean(0), rtol=1e-5
    )


class Inputs(nn.Module):
    """Two inputs, a stream, a counter, a cache, and more from training."""

    @nn.compact
    def __call__(self, x, y, mode):
        train = mode == "train"
        count = self.variable("counters", "calls", jnp.zeros, (), jnp.int32)
        count.value += 1
        noise = jax.random.normal(self.make_rng("noise"), ())
        z = norm(train)(x) + y
        if not train:
            return z
        self.variable("cache", "noise", lambda: noise).value = noise
        return z, {"positive": z > 0, "mean": z.mean()}


def test_several_inputs_streams_and_collections(batches):
    def call(model, batch, train):
        return model(batch["x"], batch["y"], "train" if train else "test")

    model = Inputs()
    given = [{"x": x, "y": x[:, :1] * np.ones(4, np.float32)} for x in batches]
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    variables = model.init(keys, given[0]["x"], given[0]["y"], "test")
    options = dict(call=call, mutable=["cache"])
    report = check(model, variables, given, certify=False, **options)
    # The outputs of both modes have y in common.
    assert 0.1 < report.gap < 3
    check(model, variables, given, certify=False, **options, rngs=keys)
    with pytest.raises(ValueError, match=r"its name: mutable=\["):
        precise.recompute(model, variables, given, call=call)
    wrong = {"dropout": jax.random.key(0)}
    with pytest.raises(ValueError, match="Pass a key for that stream in rngs"):
        precise.recompute(model, variables, given, **options, rngs=wrong)


class Example(nn.Module):
    """Sees one example; the batch is the axis of a vmap."""

    @nn.compact
    def __call__(self, x, train):
        return norm(train, axis_name="batch")(x)


def test_a_mapped_call(batches):
    mapped = nn.vmap(
        lambda model, x, train: model(x, train),
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        in_axes=(0, None),
        axis_name="batch",
    )
    model = Example()
    variables = model.init(jax.random.key(0), batches[0, 0], False)
    check(model, variables, batches, certify=False, call=mapped)


class Decides(nn.Module):
    """Knows the mode by what it may write, as flax's examples do."""

    @nn.compact
    def __call__(self, x):
        return norm(self.is_mutable_collection("batch_stats"))(x)


def test_the_mode_is_what_may_be_written(batches):
    model = Decides()
    variables = model.init(jax.random.key(0), batches[0])
    call = lambda model, batch, train: model(batch)  # noqa: E731
    report = check(model, variables, batches, certify=False, call=call)
    assert report.gap > 0.1


def test_outputs_that_are_booleans(batches):
    class Above(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return norm(train)(x) > 0

    model = Above()
    variables = model.init(jax.random.key(0), batches[0], False)
    report = check(model, variables, batches, certify=False)
    x = batches.reshape(-1, 4)
    wrong = sum(((b > b.mean(0)) != (b > 0)).sum() for b in batches)
    right = sum((b > b.mean(0)).sum() for b in batches)
    assert report.gap == pytest.approx(np.sqrt(wrong / right)) and len(x) == 48


def test_nothing_in_common(batches):
    class Loss(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = norm(train)(x)
            return y.mean() if train else y

    model = Loss()
    variables = model.init(jax.random.key(0), batches[0], False)
    report = doctor.examine(model, variables, batches, quiet=True)
    assert report.gap is None
    assert "outputs in training and inference have nothing in" in str(report)


# flax.nnx


class NnxArgument(nnx.Module):
    def __init__(self, rngs):
        self.norm = jaxbn.nnx.BatchNorm(4, axis_name="data", rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x, training=False):
        return self.drop(
            self.last(self.norm(x, use_running_average=not training))
        )


class NnxMode(NnxArgument):
    def __call__(self, x, y, mode):
        return super().__call__(x, mode == "train") + y


class NnxExample(NnxArgument):
    def __call__(self, x):
        return self.norm(x)


def test_nnx_modes_of_the_call(batches):
    report = check(NnxArgument(nnx.Rngs(0)), None, batches)
    assert report.gap > 0.1

    def call(model, batch, train):
        return model(batch, 0, "train" if train else "test")

    check(NnxMode(nnx.Rngs(0)), None, batches, certify=False, call=call)
    model = NnxArgument(nnx.Rngs(0))
    with pytest.raises(ValueError, match="is in inference mode, in norm. Set"):
        jaxbn.nnx.batch_moments(model, batches[0])
    found = jaxbn.nnx.batch_moments(
        model, batches[0], call=lambda model, batch, train: model(batch, train)
    )
    np.testing.assert_allclose(
        found["norm"].mean, batches[0].mean(0), rtol=1e-5
    )
    assert not model.norm.mean[...].any()


def test_nnx_mapped_call(batches):
    def call(model, batch, train):
        run = nnx.vmap(
            lambda model, x: model(x), in_axes=(None, 0), axis_name="data"
        )
        return run(model, batch)

    check(NnxExample(nnx.Rngs(0)), None, batches, certify=False, call=call)


class Generator(nn.Module):
    """Draws its input: two batches alike are not the same."""

    @nn.compact
    def __call__(self, x, train):
        z = jax.random.normal(self.make_rng("latent"), x.shape)
        return norm(train)(z)


class NnxGenerator(NnxArgument):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.rngs = rngs

    def __call__(self, x):
        return self.norm(jax.random.normal(self.rngs.latent(), x.shape))


@pytest.mark.parametrize("linen", [True, False])
def test_each_batch_draws_its_own_numbers(batches, linen):
    model, variables = NnxGenerator(nnx.Rngs(0, latent=1)), None
    if linen:
        model = Generator()
        variables = model.init(jax.random.key(0), batches[0], False)
    same = [batches[0]] * 3
    found = precise.recompute(model, variables, same)
    assert found.error > 0.05
    report = doctor.examine(model, variables, same, devices=1, quiet=True)
    assert report.layers[0].noise > 0.05
    if linen:
        options = dict(rngs=jax.random.key(1))
        other = precise.recompute(model, variables, same, **options)
        assert (other.stats["norm"].mean != found.stats["norm"].mean).all()
    else:  # and the model's streams are where they were
        assert model.rngs.latent.count[...] == 0


# What is refused


def test_one_error_shows_how_to_write_it(batches):
    linen = Inputs()
    variables = {"batch_stats": {"norm": {}}}
    tools = [
        functools.partial(precise.recompute, batches=batches),
        functools.partial(doctor.examine, batches=batches),
        functools.partial(assert_shard_invariant, batch=batches[0]),
    ]
    for tool in tools:
        with pytest.raises(ValueError) as raised:
            tool(linen, variables=variables)
        text = str(raised.value)
        assert text.startswith("Cannot call Inputs without call=")
        assert "it takes (x, y, mode)" in text
        assert 'call=lambda model, batch, train: model(batch["x"]' in text
        assert "model.clone(mode=train, parent=model.scope)(batch)" in text
        with pytest.raises(
            ValueError, match="Cannot call NnxMode without call="
        ) as raised:
            tool(NnxMode(nnx.Rngs(0)), variables=None)
        assert "clone" not in str(raised.value)
        for option in (dict(rngs=jax.random.key(0)), dict(mutable=["a"])):
            (name,) = option
            with pytest.raises(ValueError, match=f"{name}= is for flax.linen"):
                tool(NnxArgument(nnx.Rngs(0)), variables=None, **option)


def test_functions_are_called_as_they_are(batches):
    message = "call, rngs and mutable are only for flax models; got a function"
    call = lambda model, batch, train: batch  # noqa: E731
    with pytest.raises(ValueError, match=message):
        precise.recompute(lambda v, b: None, None, batches, call=call)
    with pytest.raises(ValueError, match=message):
        assert_shard_invariant(lambda v, b: None, None, batches[0], call=call)


def test_the_batch_goes_to_call_alone(batches):
    call = lambda model, batch, train: model(batch)  # noqa: E731
    message = "With call=, pass the batch as the only argument"
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxbn.linen.batch_moments(Field(), {}, *batches[:2], call=call)
    with pytest.raises(ValueError, match="got arguments 0, training. Put"):
        jaxbn.nnx.batch_moments(
            NnxArgument(nnx.Rngs(0)), batches[0], training=True, call=call
        )


def test_flax_models_need_no_conversion(batches):
    class Flax(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train, name="norm")(x)

    model = Flax()
    variables = model.init(jax.random.key(0), batches[0], False)
    check(model, variables, batches, certify=False)
    check(
        convert.to_jaxbn(model, axis_name="data"),
        variables,
        batches,
        certify=False,
    )
