"""Batch norm layers that authors wrote again: converted, or listed."""

import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
from jaxbn import convert
from tests.helpers import custom_norms
from tests.helpers.flax_models import Block, C, data, program, std

pytestmark = pytest.mark.sample(2)

KEY = jax.random.key(0)


class Net(nn.Module):
    """A layer that is told in the call what is training."""

    norm: Any

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(C)(x)
        return self.norm(name="norm")(x, train)


class Inverse(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(C)(x)
        return self.norm(name="norm")(x, not train)


class OwnInit(nn.BatchNorm):
    """A subclass that changes nothing but defaults."""

    momentum: float = 0.7
    scale_init: Any = nn.initializers.constant(0.5)


class OwnCall(nn.BatchNorm):
    """A subclass that is told the contrary."""

    def __call__(self, x, train):
        return super().__call__(x, not train)


@pytest.mark.parametrize(
    "net, norm, options",
    [
        (Inverse, custom_norms.Copy, {}),
        (Inverse, custom_norms.Copy, dict(momentum=0.5, epsilon=1e-3)),
        (Inverse, custom_norms.Copy, dict(use_scale=False, use_bias=False)),
        (Inverse, custom_norms.Copy, dict(axis_name="data")),
        (Inverse, custom_norms.Copy, dict(mean_init=np.ones, var_init=np.ones)),
        (Net, custom_norms.Training, {}),
        (Net, custom_norms.Training, dict(epsilon=0.1, use_bias=False)),
        (Inverse, OwnInit, {}),
        (Net, OwnCall, {}),
    ],
)
def test_a_copy_becomes_the_layer(net, norm, options):
    x = data()
    plain = net(functools.partial(norm, **options))
    model = convert.to_jaxbn(plain)
    variables = plain.init(KEY, x)
    chex.assert_trees_all_equal(model.init(KEY, x), variables)
    chex.assert_trees_all_equal(jax.jit(model.init)(KEY, x), variables)
    same = {
        name: value
        for name, value in options.items()
        if name not in ("mean_init", "var_init")
    }
    if norm is OwnInit:
        same = dict(momentum=0.7)
    want = Inverse(functools.partial(jaxbn.linen.BatchNorm, **same))
    assert program(model, variables, x) == program(want, variables, x)
    assert str(jax.make_jaxpr(model.apply, static_argnums=2)(variables, x, 0))
    # And with a field that adds a variable, which init makes as well.
    counting = convert.to_jaxbn(plain, momentum=None)
    got = counting.init(KEY, x)
    got["batch_stats"]["norm"].pop("steps")
    chex.assert_trees_all_equal(got, variables)


@pytest.mark.parametrize(
    "norm, why",
    [
        (custom_norms.Deviations, "computes something else: outputs differ"),
        (
            custom_norms.WithoutGradient,
            "computes something else: gradients differ",
        ),
        (
            custom_norms.OutsideTheRoot,
            "computes something else: outputs differ",
        ),
        (custom_norms.Ghost, "computes something else: outputs differ"),
        (
            custom_norms.Unbiased,
            "computes something else: running statistics differ",
        ),
        (
            custom_norms.Renorm,
            "which has batch_stats/r_max [], batch_stats/steps",
        ),
        (
            custom_norms.Virtual,
            "which has batch_stats/batch_norm_running_mean [1, 3]",
        ),
    ],
)
def test_what_only_looks_like_one(norm, why):
    x, model = data(1), Inverse(norm)
    change = convert.to_jaxbn(model)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(change.init, KEY, x)
    text = str(caught.value)
    assert "norm is tests.helpers.custom_norms." + norm.__name__ in text, text
    assert why in text, text
    assert f"replace={{{norm.__name__}: rule}}" in text
    # With the variables of the author's layer, too, and in inference.
    variables = model.init(KEY, x)
    with pytest.raises(ValueError, match=re.escape(why)):
        change.apply(variables, x, train=False)
    kept = convert.to_jaxbn(model, keep=[norm])
    assert program(kept, variables, x) == program(model, variables, x)
    kept = convert.to_jaxbn(model, keep=["norm"])
    assert program(kept, variables, x) == program(model, variables, x)


class Several(nn.Module):
    """Three that are left, one of them in a block, and one that is not."""

    @nn.compact
    def __call__(self, x, train=True):
        seen = self.variable("batch_stats", "obs_mean", np.zeros, (C,))
        self.variable("batch_stats", "obs_var", np.ones, (C,))
        x = custom_norms.Renorm(train is False, name="first")(x - seen.value)
        x = Block()(x, train)
        return Inverse(custom_norms.Deviations, name="block")(x, train)


def test_everything_that_is_left_is_listed():
    x = data(1)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(convert.to_jaxbn(Several()).init, KEY, x)
    _, *lines, _ = str(caught.value).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["first", "is", "tests.helpers.custom_norms.Renorm,"],
        ["block/norm", "is", "tests.helpers.custom_norms.Deviations,"],
        ["the", "model", "itself"],
    ]
    assert "which owns obs_mean and obs_var in batch_stats" in lines[2]
    keep = [Several, "first", custom_norms.Deviations]
    model = convert.to_jaxbn(Several(), keep=keep)
    variables = model.init(KEY, x)
    y, new = model.apply(variables, x, mutable=["batch_stats"])
    assert new["batch_stats"]["Block_0"]["BatchNorm_0"]
    back = convert.to_flax(model)
    assert program(back, variables, x) == program(Several(), variables, x)
    # Only what the call in question runs.
    whole = nn.Sequential([nn.Dense(C), custom_norms.Renorm(True)])
    bound = convert.to_jaxbn(whole).bind(whole.init(KEY, x))
    assert bound.layers[0](x).shape == x.shape
    with pytest.raises(ValueError, match="layers_1 is .*Renorm, which has"):
        bound(x)


class WithFields(nn.Module):
    """A model with the fields of a layer, and none of its variables."""

    momentum: float = 0.5
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train=True):
        return Block(decay=self.momentum)(x, train)


def test_only_what_owns_statistics_is_tried(monkeypatch):
    monkeypatch.setattr("jaxbn.convert._copies.read", None)
    x, model = data(), convert.to_jaxbn(WithFields())
    variables = model.init(KEY, x)
    assert (
        abs(std(model.apply, variables, x, mutable=["batch_stats"]) - 1) < 1e-3
    )


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, paddings, train=True):
        x = nn.Dense(C)(x)
        return custom_norms.Padded(C, name="norm")(x, paddings, train)


def padded(norm, x, paddings, train):
    layer = jaxbn.linen.BatchNorm(
        momentum=norm.batch_norm_momentum, epsilon=1e-3
    )
    keep = (1 - paddings[:, None]) > 0
    return layer, dict(mask=keep, use_running_average=not train)


def test_a_rule_for_a_class():
    x, paddings = data(), np.array([0] * 5 + [1] * 3, np.float32)
    model = convert.to_jaxbn(Masked(), replace={custom_norms.Padded: padded})
    variables = model.init(KEY, x, paddings)
    names = {name: tree.keys() for name, tree in variables.items()}
    assert names["batch_stats"] == {"norm"}
    assert variables["params"]["norm"].keys() == {"scale", "bias"}
    y, new = model.apply(variables, x, paddings, mutable=["batch_stats"])
    np.testing.assert_allclose(np.std(y[:5], 0), 1, atol=1e-2)
    h = nn.Dense(C).apply({"params": variables["params"]["Dense_0"]}, x)
    np.testing.assert_allclose(
        new["batch_stats"]["norm"]["mean"], 0.001 * h[:5].mean(0), rtol=1e-4
    )
    faster = convert.to_jaxbn(model, momentum=0.5)
    _, new = faster.apply(variables, x, paddings, mutable=["batch_stats"])
    np.testing.assert_allclose(
        new["batch_stats"]["norm"]["mean"], 0.5 * h[:5].mean(0), rtol=1e-4
    )
    theirs = Masked().init(KEY, x, paddings)
    message = "norm: the variables of .*Padded are named params/gamma; those of"
    with pytest.raises(ValueError, match=message):
        model.apply(theirs, x, paddings, train=False)


def test_rules_are_for_subclasses_too_and_may_be_the_layer_itself():
    x = data()
    rule = {custom_norms.Copy: jaxbn.linen.BatchNorm}
    model = convert.to_jaxbn(Inverse(custom_norms.Unbiased), replace=rule)
    variables = Inverse(custom_norms.Copy).init(KEY, x)
    want = Inverse(jaxbn.linen.BatchNorm)
    assert program(model, variables, x) == program(want, variables, x)
    again = convert.to_jaxbn(Inverse(custom_norms.Unbiased), replace=dict(rule))
    assert model == again and hash(model) == hash(again)
    back = convert.to_flax(model)  # the author's layer, which flax has not
    plain = Inverse(custom_norms.Unbiased)
    assert program(back, variables, x) == program(plain, variables, x)


def test_rules_that_return_something_else():
    for made in (nn.BatchNorm(parent=None), None, (jaxbn.linen.BatchNorm(), 1)):
        rule = {custom_norms.Copy: lambda norm, x, inference, made=made: made}
        model = convert.to_jaxbn(Inverse(custom_norms.Copy), replace=rule)
        message = "norm: the rule that replace has for Copy must return a jaxbn"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, KEY, data(1))
    with pytest.raises(ValueError, match="replace must map classes to funct"):
        convert.to_jaxbn(Block(), replace={"Copy": padded})
    with pytest.raises(ValueError, match="keep must hold classes, or paths"):
        convert.to_jaxbn(Block(), keep=[nn.BatchNorm()])


def test_a_copy_under_lifted_transforms_and_with_captures():
    x = data()
    model = convert.to_jaxbn(nn.Sequential([Block(custom_norms.Copy)]))
    plain = nn.Sequential([Block(custom_norms.Copy)])
    assert model.tabulate(KEY, x) == plain.tabulate(KEY, x)
    lifted = nn.jit(nn.remat(Block, static_argnums=2), static_argnums=2)
    axes = dict(params=0, batch_stats=0)
    many = nn.vmap(
        lifted, in_axes=(None, None), axis_size=2, variable_axes=axes,
        split_rngs=dict(params=True),
    )  # fmt: skip
    got = convert.to_jaxbn(many(custom_norms.Copy))
    variables = jax.jit(got.init, static_argnums=2)(KEY, x, True)
    y, _ = got.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.std(y, 1), 1, atol=1e-2)


def test_what_interceptors_see():
    seen, x = [], data(1)

    def tap(call, args, kwargs, context):
        layer = context.module
        if (
            isinstance(layer, custom_norms.Copy)
            and context.method_name == "__call__"
        ):
            before = convert.runs_as(layer, *args, **kwargs)
            y = call(*args, **kwargs)
            seen.append((before, convert.runs_as(layer)))
            return y
        return call(*args, **kwargs)

    model = convert.to_jaxbn(Block(custom_norms.Copy), axis_name="data")
    with nn.intercept_methods(tap):
        variables = jax.eval_shape(model.init, KEY, x)
    (pair,) = seen
    for layer in pair:
        assert type(layer) is jaxbn.linen.BatchNorm
        assert layer.axis_name == "data" and layer.momentum == 0.9
    moments = jax.eval_shape(
        functools.partial(jaxbn.linen.batch_moments, model), variables, x
    )
    assert moments["Copy_0"].mean.shape == (C,)


def test_an_unknown_number_of_examples():
    x, model = data(), convert.to_jaxbn(Inverse(custom_norms.Copy))
    variables = model.init(KEY, x)
    (n,) = jax.export.symbolic_shape("n")
    of = jax.ShapeDtypeStruct((n, C), x.dtype)
    apply = jax.jit(functools.partial(model.apply, train=False))
    exported = jax.export.export(apply)(variables, of)
    np.testing.assert_allclose(
        exported.call(variables, x), apply(variables, x), rtol=1e-5
    )


class Wrapped(nn.Module):
    """An nnx layer inside linen."""

    norm: Any = nnx.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(C)(x)
        layer = nnx.bridge.to_linen(self.norm, C, name="norm")
        return layer(x, use_running_average=not train)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, custom_norms.NnxCopy])
def test_nnx_inside_linen(norm):
    x, plain = data(), Wrapped(norm)
    model = convert.to_jaxbn(plain, axis_name="data")
    variables = plain.init(KEY, x)
    chex.assert_trees_all_equal(model.init(KEY, x), variables)
    run = functools.partial(model.apply, variables, mutable=["batch_stats"])
    assert abs(std(run, x) - 1) < 1e-3
    assert abs(std(jax.jit(run), x) - 1) < 1e-3
    split = jax.vmap(run, axis_name="data")(x.reshape(4, 2, C))[0]
    np.testing.assert_allclose(split.reshape(x.shape), run(x)[0], atol=1e-3)
    back = convert.to_flax(model)
    if norm is nnx.BatchNorm:
        assert program(back, variables, x) == program(plain, variables, x)


def test_nnx_inside_linen_is_listed_with_its_path():
    class Body(nnx.Module):
        def __init__(self, rngs):
            self.good = nnx.BatchNorm(C, rngs=rngs)
            self.bad = nnx.List([custom_norms.GraphNorm(C)])

        def __call__(self, x):
            return self.good(x, use_running_average=False)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nnx.bridge.ToLinen(Body, name="body")(x)

    x = data()
    message = "body/bad/0 is .*GraphNorm, which owns running_mean and running_v"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(convert.to_jaxbn(Outer()).init, KEY, x)
    model = convert.to_jaxbn(Outer(), keep=["body/bad/0"])
    variables = model.init(KEY, x)
    assert (
        abs(std(model.apply, variables, x, mutable=["batch_stats"]) - 1) < 1e-3
    )
