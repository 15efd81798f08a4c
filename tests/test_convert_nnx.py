"""nnx models with flax's BatchNorm, exchanged in a copy, and back."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from tests.helpers import custom_norms
from tests.helpers.flax_models import (
    Block,
    C,
    data,
)


class NnxNet(nnx.Module):
    """Holds layers in every way there is, one of them twice."""

    def __init__(self, norm):
        layer = functools.partial(norm, C, rngs=nnx.Rngs(0))
        self.shared = layer(momentum=0.9)
        self.again = nnx.data([self.shared])
        self.pair = nnx.data((layer(use_bias=False), layer(use_scale=False)))
        self.many = nnx.List([layer(epsilon=1e-2)])
        self.by_name = nnx.Dict(a=layer(axis=-1))
        self.body = nnx.Sequential(
            nnx.Linear(C, C, rngs=nnx.Rngs(1)), layer(dtype=jnp.float32)
        )
        self.parent = nnx.data(None)

        @nnx.vmap
        def make(key):
            return norm(C, rngs=nnx.Rngs(key), momentum=0.7)

        self.stack = make(jax.random.split(jax.random.key(0), 2))

    def __call__(self, x):
        for layer in (
            self.shared,
            self.body,
            *self.again,
            *self.pair,
            *self.many,
            *self.by_name.values(),
        ):
            x = layer(x)
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        return run(self.stack, x).sum(0)


def nnx_program(model, x):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, rest, x):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            y = model(x)
            return (y * x).sum(), (y, nnx.state(model, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    return str(jax.make_jaxpr(step)(params, rest, x))


class NnxTest(parameterized.TestCase):
    def test_runs_the_program_of_a_model_written_with_jaxbn(self):
        x = data()
        flax, ours = NnxNet(nnx.BatchNorm), NnxNet(jaxbn.nnx.BatchNorm)
        got = convert.to_jaxbn(flax)
        want = nnx_program(ours, x)
        assert nnx_program(flax, x) != want
        assert nnx_program(got, x) == want
        assert nnx.graphdef(got) == nnx.graphdef(ours)
        for model in (ours, got):
            back = convert.to_flax(model)
            assert nnx.graphdef(back) == nnx.graphdef(flax)
            assert nnx_program(back, x) == nnx_program(flax, x)

    def test_the_original_stays(self):
        x, flax = data(1), NnxNet(nnx.BatchNorm)
        flax.shared.mean.set_value(jnp.arange(3.0))
        flax.shared.note, flax.parent = "mine", flax  # a cycle
        flax.eval()
        before = jax.tree.map(np.array, nnx.state(flax))
        model = convert.to_jaxbn(flax, axis_name="data")
        assert type(flax.shared) is nnx.BatchNorm
        assert model.parent is model and model.shared.note == "mine"
        assert model.again[0] is model.shared
        assert model.shared.use_running_average
        chex.assert_trees_all_equal(nnx.state(model), before)
        model.parent = flax.parent = None
        chex.assert_trees_all_close(model(x), flax(x), rtol=1e-5)
        model.train()
        nnx.jit(lambda model, x: model(x))(model, x)
        chex.assert_trees_all_equal(nnx.state(flax), before)
        assert (model.shared.mean[...] != flax.shared.mean[...]).all()

    def test_overrides(self):
        x = data(1)
        model = convert.to_jaxbn(
            NnxNet(nnx.BatchNorm),
            momentum=None,
            axis_name="data",
            running=jaxbn.Running(skip_nonfinite=True),
        )
        assert model.stack.steps.shape == (2, C)
        assert model.stack.skipped.shape == (2,)
        model(x)
        np.testing.assert_allclose(
            model.shared.mean[...], 0.5 * x.mean(0), rtol=1e-5
        )
        assert model.shared.axis_name == "data"
        again = convert.to_jaxbn(
            model,
            sharing=jaxbn.Scope(group_size=2),
            running=jaxbn.Running(mode="frozen"),
        )
        assert again.shared.running.mode == "frozen"
        assert again.shared.momentum is None
        assert again.shared.sharing.group_size == 2
        assert model.shared.sharing.group_size is None
        np.testing.assert_array_equal(again.shared.steps[...], [2, 2, 2])
        plain = dict(
            sharing=jaxbn.Scope(),
            running=jaxbn.Running(),
            momentum=0.9,
        )
        back = convert.to_flax(convert.to_jaxbn(again, **plain))
        assert back.shared.axis_name == "data" and back.shared.momentum == 0.9
        assert not hasattr(back.shared, "steps")

    def test_linen_inside_nnx(self):
        model = nnx.bridge.ToNNX(Block(), rngs=nnx.Rngs(0)).lazy_init(data())
        got = convert.to_jaxbn(model)
        assert abs(np.std(got(data(), mutable=["batch_stats"])) - 1) < 1e-2
        y = model(data(), mutable=["batch_stats"])
        assert abs(np.std(y) - 1) > 1e-2

    def test_what_is_refused(self):
        net = NnxNet(nnx.BatchNorm)
        message = (
            r"shared: sharing=Scope\(num_ids=2\) would turn mean of shape "
            r"\(3,\) into \(2"
        )
        with pytest.raises(ValueError, match=message.replace("shared", ".*")):
            convert.to_jaxbn(net, sharing=jaxbn.Scope(num_ids=2))
        with pytest.raises(ValueError, match="use_bias=False would turn bias"):
            convert.to_jaxbn(net, use_bias=False)

        class Own(nnx.BatchNorm):
            def __call__(self, x):
                return super().__call__(x)

        class Ours(jaxbn.nnx.BatchNorm):
            pass

        net.many[0] = Own(C, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="many/0 is .*Own, a subclass of"):
            convert.to_jaxbn(net)
        kept = convert.to_jaxbn(net, keep=[Own])
        assert type(kept.many[0]) is Own
        kept.many[0] = Ours(C, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="many/0 is .*Ours, a subclass of"):
            convert.to_flax(kept)
        half = convert.to_jaxbn(kept, momentum=0.5)
        assert type(half.many[0]) is Ours and half.many[0].momentum == 0.5
        kept.many[0] = jaxbn.nnx.BatchNorm(
            C, sharing=jaxbn.Scope(num_ids=2), rngs=nnx.Rngs(0)
        )
        message = (
            r"many/0: flax's BatchNorm has no counterpart of sharing=Scope\(num"
        )
        with pytest.raises(ValueError, match=message):
            convert.to_flax(kept)
        layer = jaxbn.nnx.BatchNorm(C, momentum=None, rngs=nnx.Rngs(0))
        message = "the model itself: .* no counterpart of momentum=None"
        with pytest.raises(ValueError, match=message):
            convert.to_flax(layer)


def with_layer(layer):
    return nnx.Sequential(nnx.Linear(C, C, rngs=nnx.Rngs(1)), layer)


def graph_norm(norm):
    layer = jaxbn.nnx.BatchNorm(
        norm.num_features,
        momentum=norm.momentum,
        epsilon=norm.eps,
        running=jaxbn.Running(ddof=1),
        rngs=nnx.Rngs(0),
    )
    layer.mean, layer.var = norm.running_mean, norm.running_var
    layer.scale, layer.bias = norm.weight, norm.bias
    return layer


class CopiesTest(parameterized.TestCase):
    @parameterized.parameters({}, dict(momentum=0.5, epsilon=0.1))
    def test_a_copy_becomes_the_layer(self, **options):
        x, layer = data(), custom_norms.NnxCopy(C, rngs=nnx.Rngs(0), **options)
        layer.scale.set_value(jnp.arange(1.0, 4.0))
        layer.mean.set_value(jnp.arange(3.0))
        model = convert.to_jaxbn(with_layer(layer), axis_name="data")
        got = model.layers[1]
        assert type(got) is jaxbn.nnx.BatchNorm and got.axis_name == "data"
        assert type(layer) is custom_norms.NnxCopy
        want = jaxbn.nnx.BatchNorm(
            C, rngs=nnx.Rngs(0), **{"momentum": 0.9, **options}
        )
        nnx.update(want, nnx.state(layer))
        h = model.layers[0](x)
        np.testing.assert_array_equal(
            got(h, use_running_average=False),
            want(h, use_running_average=False),
        )
        chex.assert_trees_all_equal(nnx.state(got), nnx.state(want))

    def test_what_is_left_is_listed(self):
        class Own(nnx.BatchNorm):
            def __call__(self, x, use_running_average=None, *, mask=None):
                return 1 + super().__call__(x, use_running_average, mask=mask)

        class Same(nnx.BatchNorm):
            pass

        def own(cls, **options):
            return cls(C, rngs=nnx.Rngs(0), **options)

        layers = [
            own(nnx.BatchNorm),
            own(custom_norms.NnxCopy, ddof=1),
            custom_norms.GraphNorm(C),
            own(Own),
            own(Same),
        ]
        with pytest.raises(ValueError) as caught:
            convert.to_jaxbn(nnx.List(layers))
        _, *lines, last = str(caught.value).splitlines()
        assert [line.split()[0] for line in lines] == ["1", "2", "3"], lines
        for line, words in zip(
            lines,
            (
                "NnxCopy, which has the attributes of flax's layer and "
                "computes something else: running statistics differ",
                "GraphNorm, which owns running_mean and running_var",
                "a subclass of flax.nnx.BatchNorm that may compute something",
            ),
        ):
            assert words in line, line
        assert "keep=[NnxCopy, GraphNorm, Own]" in last
        keep = [custom_norms.NnxCopy, "2", Own]
        kept = convert.to_jaxbn(nnx.List(layers), keep=keep)
        same = [type(new) is type(old) for new, old in zip(kept, layers)]
        assert same == [False, True, True, True, False]

    def test_a_rule_for_a_class(self):
        x, plain = data(), with_layer(custom_norms.GraphNorm(C))
        plain.again = plain.layers[1]
        rule = {custom_norms.GraphNorm: graph_norm}
        model = convert.to_jaxbn(plain, replace=rule, axis_name="data")
        layer = model.layers[1]
        assert type(layer) is jaxbn.nnx.BatchNorm and model.again is layer
        assert layer.axis_name == "data" and layer.running.ddof == 1
        model.train()
        np.testing.assert_allclose(np.std(model(x), 0), 2, atol=1e-2)
        assert float(layer.mean[0]) != 0
        assert float(plain.layers[1].running_mean[0]) == 0
        layer = custom_norms.NnxCopy(C, ddof=1, momentum=0.25, rngs=nnx.Rngs(0))
        rule = {custom_norms.NnxCopy: jaxbn.nnx.BatchNorm}
        named = convert.to_jaxbn(with_layer(layer), replace=rule).layers[1]
        assert type(named) is jaxbn.nnx.BatchNorm and named.momentum == 0.25
        wrong = {custom_norms.GraphNorm: lambda norm: norm}
        message = (
            "again: the rule that replace has for GraphNorm must.*got GraphN"
        )
        with pytest.raises(ValueError, match=message):
            convert.to_jaxbn(plain, replace=wrong)
