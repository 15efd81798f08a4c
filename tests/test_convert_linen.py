"""linen models whose code says flax's BatchNorm, run with jaxbn's, and back."""

import copy
import functools
import pickle
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from jaxbn.testing import assert_shard_invariant
from tests.helpers.flax_models import (
    MODELS,
    Block,
    C,
    FromOutside,
    InSetup,
    N,
    ResNet,
    data,
    program,
)

pytestmark = pytest.mark.sample(2)


class LinenTest(parameterized.TestCase):
    @parameterized.parameters(*MODELS)
    def test_runs_the_program_of_a_model_written_with_jaxbn(self, name):
        plain = MODELS[name](nn.BatchNorm)
        want = MODELS[name](jaxbn.linen.BatchNorm)
        got, back = convert.to_jaxbn(plain), convert.to_flax(want)
        x, key = data(), jax.random.key(0)
        variables = jax.jit(plain.init)(key, x)
        chex.assert_trees_all_equal(jax.jit(got.init)(key, x), variables)
        ours, flaxs = (program(m, variables, x) for m in (want, plain))
        assert ours != flaxs
        assert program(got, variables, x) == ours
        assert program(back, variables, x) == flaxs
        assert program(convert.to_flax(got), variables, x) == flaxs
        assert program(convert.to_jaxbn(back), variables, x) == ours

    def test_values(self):
        plain, x = Block(), data()
        model = convert.to_jaxbn(plain)
        variables = plain.init(jax.random.key(0), x)
        y, new = model.apply(variables, x, mutable=["batch_stats"])
        params = variables["params"]["Dense_0"]
        # As Dense rounds it, the rest in float64.
        h = np.asarray(nn.Dense(C).apply({"params": params}, x), np.float64)
        want = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
        np.testing.assert_allclose(y, want, atol=1e-4)
        stats = new["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(stats["mean"], 0.1 * h.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            stats["var"], 0.9 + 0.1 * h.var(0), rtol=1e-5
        )

    def test_looks_like_the_model(self):
        plain = InSetup()
        model = convert.to_jaxbn(plain)
        assert isinstance(model, InSetup) and repr(model) == repr(plain)
        assert type(model).__name__ == "InSetup"
        x, key = data(1), jax.random.key(0)
        assert model.tabulate(key, x) == plain.tabulate(key, x)
        got, want = (
            m.init_with_output(key, x, capture_intermediates=True)
            for m in (model, plain)
        )
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
        with pytest.raises(AttributeError):
            model.nothing  # noqa: B018

    def test_what_interceptors_see(self):
        seen, dense = [], nn.Dense(1)

        def tap(call, args, kwargs, context):
            if isinstance(context.module, nn.BatchNorm):
                layer = convert.runs_as(context.module)
                seen.append((context.module.path, type(layer), layer.axis_name))
            assert convert.runs_as(dense) is dense
            return call(*args, **kwargs)

        model = convert.to_jaxbn(Block(), axis_name="data")
        x, key = data(), jax.random.key(0)
        with nn.intercept_methods(tap):
            variables = jax.eval_shape(model.init, key, x)
        ours = jaxbn.linen.BatchNorm
        assert seen == [(("BatchNorm_0",), ours, "data")]
        plain = nn.BatchNorm()
        assert convert.runs_as(plain) is plain
        moments = jax.eval_shape(
            functools.partial(jaxbn.linen.batch_moments, model), variables, x
        )
        assert moments["BatchNorm_0"].mean.shape == (C,)

    def test_equal_hashed_pickled_copied(self):
        plain, model = Block(), convert.to_jaxbn(Block(), axis_name="data")
        again = convert.to_jaxbn(Block(), axis_name="data")
        assert model == again and hash(model) == hash(again)
        assert model != plain and plain != model
        assert model != convert.to_jaxbn(Block())
        assert model != convert.to_jaxbn(Block(decay=0.5), axis_name="data")
        for twin in (
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
            copy.copy(model),
            model.clone(),
            model.copy(),
        ):
            assert twin == model and type(twin) is type(model)
        groups = [[[0, 1], [2, 3]], ((0, 1), (2, 3))]
        a, b = (convert.to_jaxbn(plain, axis_index_groups=g) for g in groups)
        assert a == b and hash(a) == hash(b)
        steps = convert.to_jaxbn(
            convert.to_jaxbn(plain, momentum=0.5), running=jaxbn.Running(ddof=1)
        )
        assert steps == convert.to_jaxbn(
            plain, running=jaxbn.Running(ddof=1), momentum=0.5
        )
        changed = model.clone(decay=0.5)
        assert changed == convert.to_jaxbn(Block(decay=0.5), axis_name="data")

    def test_subclasses_of_the_layer_are_reported(self):
        class Own(nn.BatchNorm):
            def __call__(self, x):
                return super().__call__(x) + 1

        class Ours(jaxbn.linen.BatchNorm):
            pass

        x, key = data(), jax.random.key(0)
        for own, change, base in (
            (Own, convert.to_jaxbn, "flax.linen.BatchNorm"),
            (Ours, convert.to_flax, "jaxbn.linen.BatchNorm"),
        ):
            message = (
                rf"BatchNorm_0 is .*\.Ow?[nu]r?s?, a subclass of {base} that"
            )
            own.__name__ = "BatchNorm"
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(change(Block(own)).init, key, x)
            with pytest.raises(ValueError, match="keep="):
                layer = change(own(use_running_average=False))
                jax.eval_shape(layer.init, key, x)
            kept = change(Block(own), keep=[own])
            variables = jax.eval_shape(kept.init, key, x)
            want = program(Block(own), variables, x)
            assert program(kept, variables, x) == want
            layer = change(own(use_running_average=False), keep=[own])
            jax.eval_shape(layer.init, key, x)
        # What computes with jaxbn already takes the fields.
        half = convert.to_jaxbn(Block(Ours), momentum=0.5)
        want = Block(jaxbn.linen.BatchNorm, decay=0.5)
        assert program(half, variables, x) == program(want, variables, x)

    @parameterized.parameters(
        dict(sharing=jaxbn.Scope(num_ids=2)),
        dict(running=jaxbn.Running(mode="frozen")),
        dict(running=jaxbn.Running(ddof=1)),
        dict(momentum=None),
    )
    def test_flax_cannot_express(self, **field):
        (name, value), x = *field.items(), data()
        layer = functools.partial(jaxbn.linen.BatchNorm, **field)
        message = re.escape(
            f"stem: flax's BatchNorm has no counterpart of {name}={value}."
        )
        model = convert.to_flax(FromOutside(layer, Block()))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), x)

    def test_flax_cannot_express_what_conversion_has_set(self):
        model = convert.to_jaxbn(Block(), sharing=jaxbn.Scope(num_ids=2))
        message = "every layer: flax's BatchNorm has no counterpart of sharing"
        with pytest.raises(ValueError, match=message):
            convert.to_flax(model)
        back = convert.to_flax(convert.to_jaxbn(model, sharing=jaxbn.Scope()))
        variables = jax.eval_shape(back.init, jax.random.key(0), data())
        want = program(Block(), variables, data())
        assert program(back, variables, data()) == want

    def test_calls_that_flax_cannot_take(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, ids=None):
                layer = jaxbn.linen.BatchNorm(use_running_average=False)
                return layer(x, ids=ids)

        model = convert.to_flax(Net())
        with pytest.raises(ValueError, match="BatchNorm_0 is called with ids,"):
            jax.eval_shape(
                model.init, jax.random.key(0), data(), jnp.zeros(N, int)
            )

    def test_a_resnet_becomes_independent_of_its_devices(self):
        images = np.random.default_rng(0).normal(size=(8, 4, 4, 3))
        model, images = ResNet(), images.astype(np.float32)
        variables = jax.jit(model.init)(jax.random.key(0), images)

        def certify(model):
            def apply(variables, batch):
                return model.apply(variables, batch, mutable=["batch_stats"])

            assert_shard_invariant(apply, variables, images, devices=[4])

        with pytest.raises(AssertionError, match="layer 'bn_init' differs"):
            certify(model)
        certify(convert.to_jaxbn(model, axis_name="data"))


@pytest.mark.parametrize(
    "model, options, message",
    [
        (Block(), dict(axisname="x"), "BatchNorm has no field axisname that"),
        (Block(), dict(parent=None), "BatchNorm has no field parent that"),
        (Block(), dict(renorm=([], {})), "cannot be hashed"),
        (nnx.Rngs(0), dict(scale_init=None), "has no field scale_init that"),
        (Block, {}, "must be a flax.linen or flax.nnx module; got the class"),
        ([1], {}, re.escape("module; got [1]")),
    ],
)
def test_what_cannot_be_converted(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert.to_jaxbn(model, **options)
