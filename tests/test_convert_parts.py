"""Parts of converted linen models, and converted parts of others."""

import functools
import threading

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from absl.testing import parameterized

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from tests.helpers import custom_norms
from tests.helpers.flax_models import (
    Block,
    C,
    InSetup,
    data,
    program,
    std,
)


class PartsTest(parameterized.TestCase):
    def test_bound_models_hand_out_converted_parts(self):
        model, x = convert.to_jaxbn(InSetup()), data()
        variables = model.init(jax.random.key(0), x)
        mutable = ["batch_stats"]
        bound = model.bind(variables, mutable=mutable)
        now = dict(use_running_average=False)
        assert isinstance(bound.bn, jaxbn.linen.BatchNorm)
        for _ in range(2):  # names are free again after the first call
            assert abs(std(bound.bn, x, **now) - 1) < 1e-3
        mean = bound.variables["batch_stats"]["bn"]["mean"]
        np.testing.assert_allclose(mean, 0.36 * x.mean(0), rtol=1e-5)
        assert abs(std(bound.second, x, **now) - 1) < 1e-3
        assert abs(std(bound.encode, x) - 1) < 1e-3
        block, of_block = bound.layers[0].unbind()
        y, _ = block.apply(of_block, x, mutable=mutable)
        assert isinstance(block, Block) and abs(np.std(y) - 1) < 1e-2
        whole, _ = bound.unbind()
        assert whole == model
        for method in (
            "encode",
            InSetup.encode,
            lambda m, x: m.bn(x, **now),
        ):
            y = model.apply(variables, x, method=method, mutable=mutable)
            assert abs(np.std(y[0]) - 1) < 1e-3
            if callable(method):
                y = nn.apply(method, model, mutable=mutable)(variables, x)
                assert abs(np.std(y[0]) - 1) < 1e-3

    def test_a_part_of_a_model_converted_where_it_is_made(self):
        class Net(nn.Module):
            make: functools.partial
            decay: float

            def setup(self):
                self.bn = self.make(nn.BatchNorm(momentum=self.decay))
                self.named = self.make(
                    nn.BatchNorm(name="own", momentum=self.decay)
                )
                self.block = self.make(Block(decay=self.decay))

            @nn.compact_name_scope
            def inside(self, x):
                return self.make(Block(decay=self.decay))(x)

            def __call__(self, x):
                for layer in (self.bn, self.named):
                    x = layer(x, use_running_average=False)
                return self.inside(self.block(x))

        half = functools.partial(convert.to_jaxbn, momentum=0.5)
        x, key = data(), jax.random.key(0)
        got, want = Net(half, 0.9), Net(convert.to_jaxbn, 0.5)
        plain = Net(lambda module: module, 0.5)
        variables = jax.jit(plain.init)(key, x)
        chex.assert_trees_all_equal(jax.jit(got.init)(key, x), variables)
        assert program(got, variables, x) == program(want, variables, x)
        assert program(got, variables, x) != program(plain, variables, x)

    def test_models_in_models(self):
        x = data(1)

        class Net(nn.Module):
            inner: nn.Module

            @nn.compact
            def __call__(self, x):
                nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
                return self.inner(x, use_running_average=False)

        def decays(model):
            @jax.jit
            def run(x):
                variables = model.init(jax.random.key(0), x)
                _, new = model.apply(variables, x, mutable=["batch_stats"])
                return new["batch_stats"]

            new = run(x)
            layers = new["BatchNorm_0"], new["inner"]["layers_0"]
            return [
                round(float(1 - (layer["mean"] / x.mean(0)).mean()), 3)
                for layer in layers
            ]

        inner = nn.Sequential([nn.BatchNorm()])
        assert decays(Net(inner)) == [0.9, 0.99]
        one = convert.to_jaxbn(inner, momentum=0.5, running=jaxbn.Running())
        assert decays(Net(one)) == [0.9, 0.5]
        both = convert.to_jaxbn(Net(one), momentum=0.25)
        assert decays(both) == [0.25, 0.25]
        assert decays(convert.to_jaxbn(both, momentum=0.125)) == [0.125] * 2
        assert decays(convert.to_jaxbn(Net(one), epsilon=1e-3)) == [0.9, 0.5]
        assert decays(convert.to_jaxbn(both, epsilon=1e-3)) == [0.25, 0.25]
        assert decays(convert.to_flax(Net(one))) == [0.9, 0.5]

    def test_beside_the_original_they_share_nothing(self):
        class Net(nn.Module):
            a: nn.Module
            b: nn.Module

            def __call__(self, x):
                return self.a(x), self.b(x)

        block = Block()
        model, x = Net(block, convert.to_jaxbn(block)), data()
        (y, z), variables = jax.jit(model.init_with_output)(
            jax.random.key(0), x
        )
        assert variables["params"].keys() == {"a", "b"}
        assert abs(np.std(z) - 1) < 1e-2 < abs(np.std(y) - 1)

    def test_threads_have_conversions_of_their_own(self):
        x, results = data(), {}
        models = {
            0.9: Block(),
            0.5: convert.to_jaxbn(Block(), momentum=0.5),
            0.25: convert.to_jaxbn(Block(), momentum=0.25),
        }
        variables = Block().init(jax.random.key(0), x)
        barrier = threading.Barrier(len(models))

        def run(decay):
            for _ in range(3):
                barrier.wait()
                y, new = models[decay].apply(
                    variables, x, mutable=["batch_stats"]
                )
                mean = new["batch_stats"]["BatchNorm_0"]["mean"]
                results.setdefault(decay, []).append((np.std(y), mean))

        threads = [threading.Thread(target=run, args=(d,)) for d in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mean = (
            nn.Dense(C)
            .apply({"params": variables["params"]["Dense_0"]}, x)
            .mean(0)
        )
        for decay, found in results.items():
            assert len(found) == 3
            for size, got in found:
                assert (abs(size - 1) < 1e-2) == (decay != 0.9)
                np.testing.assert_allclose(got, (1 - decay) * mean, rtol=1e-4)

    def test_scopes_that_are_shared_with_a_layer(self):
        class Net(nn.Module):
            def setup(self):
                self.bn = nn.BatchNorm(momentum=0.5)
                nn.share_scope(self, self.bn)

            def __call__(self, x):
                return self.bn(x, use_running_average=False)

            def encode(self, x):
                return x

        x, model = data(), convert.to_jaxbn(Net())
        variables = model.init(jax.random.key(0), x)
        assert variables["batch_stats"].keys() == {"mean", "var"}
        run = functools.partial(model.apply, mutable=["batch_stats"])
        assert abs(std(run, variables, x) - 1) < 1e-3
        # The layer does not run here, but its statistics are there.
        assert model.apply(variables, x, method="encode").shape == x.shape

    def test_an_error_of_the_model_is_its_own(self):
        class Fails(nn.Module):
            @nn.compact
            def __call__(self, x):
                nn.BatchNorm(use_running_average=False)(x)
                raise KeyError("the author's")

        with pytest.raises(KeyError, match="the author's"):
            convert.to_jaxbn(Fails()).init(jax.random.key(0), data())
        plain = nn.BatchNorm()
        assert convert.runs_as(plain) is plain  # nothing is in force

    def test_a_layer_that_is_entered_by_another_method(self):
        class Own(custom_norms.Copy):
            def forward(self, x):
                return self(x, use_running_average=False)

        class Net(nn.Module):
            layer: type

            @nn.compact
            def __call__(self, x):
                return self.layer().forward(x)

        class Plain(nn.BatchNorm):
            def forward(self, x):
                return self(x, use_running_average=False)

        for layer in (Own, Plain):
            x, model = data(), convert.to_jaxbn(Net(layer))
            variables = model.init(jax.random.key(0), x)
            run = functools.partial(model.apply, mutable=["batch_stats"])
            assert abs(std(run, variables, x) - 1) < 1e-3
