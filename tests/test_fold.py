"""Batch normalization folded into the layers in front of it."""

import collections
import functools
import re
import subprocess
import sys
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.nnx
from jaxbn.fold import Folded, fold
from jaxbn.linen import BatchNorm
from train.resnet import ResNet

NORMS = {"jaxbn": BatchNorm, "flax": nn.BatchNorm}
EPSILON = 1e-3


def randomized(shapes, seed=0):
    """Trained-looking values: scales of both signs and zero, large means."""
    rng = np.random.default_rng(seed)
    draw = {
        "mean": lambda n: rng.normal(0, 3, n),
        "var": lambda n: rng.uniform(0.3, 4, n),
        "scale": lambda n: rng.normal(0, 1, n) * (np.arange(n[-1]) != 1),
        "bias": lambda n: rng.normal(0, 1, n),
        "kernel": lambda n: rng.normal(0, np.prod(n[:-1]) ** -0.5, n),
    }

    def one(path, leaf):
        names = [getattr(k, "key", getattr(k, "name", k)) for k in path]
        known = [*(name for name in draw if name in names), "bias"]
        return jnp.asarray(draw[known[0]](leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def normal(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def initialized(model, *inputs, **options):
    # Shapes are enough; the generators of a whole model take long to compile.
    init = functools.partial(model.init, **options)
    return randomized(jax.eval_shape(init, jax.random.key(0), *inputs))


def primitives(closed):
    """How often each primitive occurs, in every body."""
    count = collections.Counter()
    pending = [closed.jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            count[eqn.primitive.name] += 1
            pending.extend(jax.extend.core.jaxprs_in_params(eqn.params))
    return count


def assert_no_norm_is_left(folded, x, *, products, joins):
    """One bias for each product; joins are additions of two data values."""
    assert all(layer.kernel for layer in folded.layers), folded.layers
    for name in folded.params:
        assert "batch_stats" not in name, name
        assert name.rpartition("/")[2] in ("kernel", "bias"), name
    program = jax.make_jaxpr(folded.apply)(folded.params, x)
    count = primitives(program)
    found = count["conv_general_dilated"] + count["dot_general"]
    assert found == products
    assert count["add"] == products + joins
    for name in ("rsqrt", "sqrt", "mul", "sub", "square"):
        assert not count[name], name
    assert not program.consts


def assert_close(got, want, rtol=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        got, want, rtol=0, atol=rtol * np.abs(want).max()
    )


class Pair(nn.Module):
    """A layer and its normalization."""

    layer: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        return self.norm(name="norm")(self.layer(name="layer")(x))


# A layer, the axes of the features in its kernel, the input, what it is called.
LAYERS = {
    "conv": (
        functools.partial(nn.Conv, 5, (3, 3), strides=2),
        (-1,),
        (2, 5, 6, 4),
        "conv",
    ),
    "conv without bias": (
        functools.partial(
            nn.Conv, 5, (3,), use_bias=False, kernel_dilation=2, padding="VALID"
        ),
        (-1,),
        (2, 9, 4),
        "conv",
    ),
    "conv on two batch axes": (
        functools.partial(nn.Conv, 5, (3,)),
        (-1,),
        (2, 3, 6, 4),
        "conv",
    ),
    "conv to one feature": (
        functools.partial(nn.Conv, 1, (3, 3)),
        (-1,),
        (2, 4, 4, 3),
        "conv",
    ),
    "grouped": (
        functools.partial(nn.Conv, 6, (3, 3), feature_group_count=2),
        (-1,),
        (2, 4, 4, 4),
        "grouped conv",
    ),
    "depthwise": (
        functools.partial(nn.Conv, 8, (3, 3), feature_group_count=4),
        (-1,),
        (2, 4, 4, 4),
        "depthwise conv",
    ),
    "transposed": (
        functools.partial(nn.ConvTranspose, 5, (3, 3), strides=(2, 2)),
        (-1,),
        (2, 4, 4, 3),
        "transposed conv",
    ),
    "transposed kernel": (
        functools.partial(
            nn.ConvTranspose, 5, (3, 3), strides=(2, 2), transpose_kernel=True
        ),
        (-2,),
        (2, 4, 4, 3),
        "transposed conv",
    ),
    "dense": (functools.partial(nn.Dense, 5), (-1,), (2, 7, 4), "dense"),
    "several features": (
        functools.partial(nn.DenseGeneral, (2, 3), axis=(-2, -1)),
        (-2, -1),
        (4, 5, 2),
        "dense",
    ),
    "kernel on the left": (
        functools.partial(nn.Einsum, (5, 4), "ni,oi->on"),
        (0,),
        (7, 4),
        "dense",
    ),
}


def reference(variables, axes):
    """Kernel and bias of the folded layer, in float64."""
    tree = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
    layer, stats = tree["params"]["layer"], tree["batch_stats"]["norm"]
    own = tree["params"].get("norm", {})
    slope = own.get("scale", 1.0) / np.sqrt(stats["var"] + EPSILON)
    bias = layer.get("bias", 0.0)
    offset = own.get("bias", 0.0) + (bias - stats["mean"]) * slope
    kernel = layer["kernel"]
    axes = [axis % kernel.ndim for axis in axes]
    others = [axis for axis in range(kernel.ndim) if axis not in axes]
    return kernel * np.expand_dims(slope, others), offset


class OneLayerTest(parameterized.TestCase):
    @parameterized.product(name=list(LAYERS), norm=list(NORMS))
    def test_matches_float64(self, name, norm):
        layer, axes, shape, kind = LAYERS[name]
        where = {"several features": (-2, -1), "kernel on the left": 0}
        norm = functools.partial(
            NORMS[norm],
            use_running_average=True,
            epsilon=EPSILON,
            axis=where.get(name, -1),
        )
        if name == "kernel on the left":
            layer = functools.partial(layer, use_bias=False)
        model = Pair(layer, norm)
        x = normal(*shape)
        variables = initialized(model, x)
        folded = fold(model.apply, variables, x)
        kernel, bias = reference(variables, axes)
        assert set(folded.params) == {
            "params/layer/kernel",
            "params/layer/bias",
        }
        assert_close(folded.params["params/layer/kernel"], kernel, 1e-6)
        assert_close(folded.params["params/layer/bias"], bias, 1e-6)
        (report,) = folded.layers
        assert report == ("norm", "params/layer/kernel", kind, None)
        assert_no_norm_is_left(folded, x, products=1, joins=0)
        assert folded.max_difference.relative < 1e-6

    @parameterized.product(
        norm=list(NORMS), use_scale=(True, False), use_bias=(True, False)
    )
    def test_with_and_without_scale_and_bias(self, norm, use_scale, use_bias):
        norm = functools.partial(
            NORMS[norm],
            use_running_average=True,
            epsilon=EPSILON,
            use_scale=use_scale,
            use_bias=use_bias,
        )
        model, x = Pair(functools.partial(nn.Dense, 5), norm), normal(3, 4)
        variables = initialized(model, x)
        folded = fold(model.apply, variables, x)
        kernel, bias = reference(variables, (-1,))
        assert_close(folded.params["params/layer/kernel"], kernel, 1e-6)
        assert_close(folded.params["params/layer/bias"], bias, 1e-6)
        assert_no_norm_is_left(folded, x, products=1, joins=0)

    @parameterized.product(norm=list(NORMS), stored=(jnp.float32, jnp.bfloat16))
    def test_bfloat16_is_rounded_once(self, norm, stored):
        dtypes = dict(dtype=jnp.bfloat16, param_dtype=stored)
        model = Pair(
            functools.partial(nn.Conv, 64, (3, 3), use_bias=False, **dtypes),
            functools.partial(
                NORMS[norm],
                use_running_average=True,
                epsilon=EPSILON,
                dtype=jnp.bfloat16,
            ),
        )
        x = normal(2, 5, 5, 8, dtype=jnp.bfloat16)
        variables = initialized(model, x)
        folded = fold(model.apply, variables, x)
        kernel, bias = reference(variables, (-1,))
        got = folded.params["params/layer/kernel"]
        assert got.dtype == stored
        # Rounded twice, a fifth of them would be off by one digit.
        rounded = kernel.astype(stored).astype(np.float64)
        error = np.abs(np.asarray(got, np.float64) - rounded)
        far = error > 3e-7 * np.abs(kernel)
        assert far.mean() < 1e-3
        assert_close(folded.params["params/layer/bias"], bias, 1e-6)
        assert folded.apply(folded.params, x).dtype == jnp.bfloat16

    def test_float64(self):
        with jax.enable_x64(True):
            norm = functools.partial(BatchNorm, use_running_average=True)
            kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64)
            model = Pair(
                functools.partial(nn.Dense, 5, **kinds),
                functools.partial(norm, epsilon=EPSILON, **kinds),
            )
            x = normal(3, 4, dtype=np.float64)
            variables = initialized(model, x)
            folded = fold(model.apply, variables, x)
            kernel, bias = reference(variables, (-1,))
            assert_close(folded.params["params/layer/kernel"], kernel, 1e-14)
            assert_close(folded.params["params/layer/bias"], bias, 1e-14)

    def test_everything_that_scales_and_shifts_goes_in(self):
        def apply(v, x):
            y = jnp.moveaxis(x, -1, 1) if x.ndim > 2 else x
            y = jnp.einsum("ni...,io->no...", y, v["w"])
            spread = (slice(None), *[None] * (y.ndim - 2))
            y = (v["c"] - y.T).T if y.ndim == 2 else -y
            y = y / 3 - v["mean"][spread]
            y = (y * jax.lax.rsqrt(v["var"] + 1e-5)[spread])[..., None]
            return jax.nn.relu((2.0 * y).squeeze(-1) * v["alpha"])

        rng = np.random.default_rng(0)
        v = {
            k: rng.uniform(0.5, 2, 5).astype(np.float32)
            for k in ("mean", "var")
        }
        v |= dict(w=normal(4, 5), alpha=np.float32(-0.7), c=np.float32(0.3))
        for x in (normal(3, 4), normal(3, 6, 2, 4)):
            folded = fold(apply, v, x)
            assert set(folded.params) == {"w", "w_bias"}
            assert [layer.norm for layer in folded.layers] == ["."]
            count = primitives(jax.make_jaxpr(folded.apply)(folded.params, x))
            assert not count["mul"] + count["div"] + count["neg"] + count["sub"]
            assert_close(folded.apply(folded.params, x), jax.jit(apply)(v, x))


class Bottleneck(nn.Module):
    width: int
    stride: int
    groups: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(
            self.width,
            (3, 3),
            strides=self.stride,
            feature_group_count=self.groups,
        )(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(
                4 * self.width, (1, 1), strides=self.stride, name="shortcut"
            )(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class BottleneckNet(nn.Module):
    """ResNet-50 in small, with a decoder of one transposed convolution."""

    norm: Any
    groups: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.norm, use_running_average=True, dtype=self.dtype
        )
        x = nn.relu(norm()(conv(8, (7, 7), strides=2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for width, stride in ((4, 1), (4, 1), (8, 2), (8, 1)):
            x = Bottleneck(width, stride, self.groups, conv, norm)(x)
        if self.groups > 1:
            x = nn.ConvTranspose(4, (3, 3), strides=(2, 2), dtype=self.dtype)(x)
            x = nn.relu(norm()(x))
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


class ModelTest(parameterized.TestCase):
    @parameterized.parameters("jaxbn", "flax")
    def test_resnet20(self, norm):
        model = ResNet(depth=20, num_classes=10, width=4, norm=NORMS[norm])
        apply = functools.partial(model.apply, train=False)
        x = normal(2, 8, 8, 3)
        variables = initialized(model, x, train=False)
        folded = fold(apply, variables, x)
        assert len(folded.layers) == 19
        assert_no_norm_is_left(folded, x, products=20, joins=9)
        assert folded.max_difference.relative < 1e-5
        x = normal(2, 8, 8, 3, seed=2)
        with jax.default_matmul_precision("highest"):  # compiled so already
            got = folded.apply(folded.params, x)
        assert_close(got, jax.jit(apply)(variables, x))

    @parameterized.parameters(
        (BatchNorm, 1, None),
        (nn.BatchNorm, 2, None),
        (BatchNorm, 2, jnp.bfloat16),
    )
    def test_bottlenecks(self, norm, groups, dtype):
        model = BottleneckNet(norm, groups, dtype)
        x = normal(2, 16, 16, 3)
        variables = initialized(model, x)
        folded = fold(model.apply, variables, x)
        convs = 1 + 4 * 3 + 2 + (groups > 1)
        assert len(folded.layers) == convs
        kinds = collections.Counter(layer.kind for layer in folded.layers)
        assert kinds["transposed conv"] == (groups > 1)
        assert kinds["grouped conv"] == 4 * (groups > 1)
        assert_no_norm_is_left(folded, x, products=convs + 1, joins=4)
        limit = 1e-5 if dtype is None else 5e-2
        assert folded.max_difference.relative < limit

    @parameterized.parameters(nnx.BatchNorm, jaxbn.nnx.BatchNorm)
    def test_nnx(self, norm):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
                self.norms = nnx.List([norm(n, rngs=rngs) for n in (6, 4)])
                self.linear = nnx.Linear(6, 4, rngs=rngs)

            def __call__(self, x):
                x = nnx.relu(self.norms[0](self.conv(x))).mean((1, 2))
                return self.norms[1](self.linear(x))

        model = randomized(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
        x = normal(2, 5, 5, 3)
        with pytest.raises(ValueError, match="'norms/0' is in training mode"):
            fold(lambda model, x: model(x), model, x)
        model.eval()
        folded = fold(lambda model, x: model(x), model, x)
        assert [layer.norm for layer in folded.layers] == ["norms/0", "norms/1"]
        assert_no_norm_is_left(folded, x, products=2, joins=0)
        assert_close(folded.apply(folded.params, x), model(x))
        graph, state = nnx.split(model)
        again = fold(lambda state, x: nnx.merge(graph, state)(x), state, x)
        assert again.layers == folded.layers
        assert set(again.params) == set(folded.params)

    def test_haiku_says_what_its_statistics_are(self):
        def forward(x, is_training):
            layer, module = hk.Linear(5), hk.BatchNorm(True, True, 0.9)
            return jax.nn.relu(module(layer(x), is_training=is_training))

        model = hk.without_apply_rng(hk.transform_with_state(forward))
        x = normal(3, 4)
        init = functools.partial(model.init, is_training=True)
        shapes = jax.eval_shape(init, jax.random.key(0), x)
        rng = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda a: rng.uniform(0.5, 2, a.shape).astype(a.dtype), shapes
        )

        def apply(v, x):
            return model.apply(*v, x, is_training=False)[0]

        with pytest.raises(ValueError, match="no running statistics"):
            fold(apply, variables, x)
        folded = fold(
            apply,
            variables,
            x,
            is_statistic=lambda path: path.endswith("_ema/average"),
        )
        assert_close(folded.apply(folded.params, x), apply(variables, x))
        assert set(folded.params) == {"0/linear/w", "0/linear/w_bias"}


class Dictated(nn.Module):
    """A model that is one function."""

    call: Any

    @nn.compact
    def __call__(self, x):
        return self.call(x)


def norm(name="norm", **options):
    return nn.BatchNorm(use_running_average=True, name=name, **options)


def dense(x, name="layer"):
    return nn.Dense(3, name=name)(x)


def after_relu(x):
    return norm()(nn.relu(dense(x)))


def below_a_fraction(x):
    return norm()(2.0 / dense(x))


def used_twice(x):
    y = dense(x)
    return nn.relu(norm()(y)) + y


def shared_kernel(x):
    layer = nn.Dense(3, name="layer")
    return norm()(layer(x)) + layer(2 * x)


def computed_kernel(x):
    return norm()(nn.WeightNorm(nn.Dense(3))(x))


def after_skip(x):
    return norm()(x + dense(x))


def on_input(x):
    return dense(norm()(x))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return norm()(dense(x)), None


def in_scan(x):
    every = {"params": 0, "batch_stats": 0}
    cells = nn.scan(
        Cell, variable_axes=every, split_rngs={"params": True}, length=2
    )
    return cells(name="cells")(x, None)[0]


def in_cond(x):
    module = norm()
    x = module(dense(x))
    return nn.cond(
        x.sum() > 0, lambda m, x: m(x), lambda m, x: -m(x), module, x
    )


def other_axis(x):
    return norm(axis=1)(nn.Dense(4, name="layer")(x[:, :3, None]))


def merged_axes(x):
    return norm()(dense(x[:, :, None]).reshape(len(x), -1))


def after_product(x):
    return norm()(x @ (x.T @ x))


def per_example(x):
    ids = jnp.argmax(x, -1)
    return BatchNorm(use_running_average=True, num_ids=3, name="norm")(
        dense(x), ids=ids
    )


def on_constant_kernel(x):
    return norm()(x @ np.eye(3, dtype=np.float32))


REFUSALS = {
    after_relu: "'norm' follows `relu`: only a convolution or dense layer",
    below_a_fraction: "'norm' follows `div`: only a convolution or dense",
    used_twice: "also used elsewhere: it goes into `sub` and `add`",
    shared_kernel: (
        "'norm' follows a layer whose kernel 'params/layer/kernel' is also "
        "used elsewhere: it goes into `dot_general` and `dot_general`"
    ),
    computed_kernel: "a layer whose kernel is computed (`",
    after_skip: "'norm' follows `add` of two values that depend on the input",
    on_input: "'norm' normalizes an input: no layer stands in front of it",
    in_scan: "'cells/norm' lies inside `scan`, whose body is left alone",
    in_cond: "'norm' lies inside `cond`, whose body is left alone",
    other_axis: "axis 1 of [4, 3, 4], in `sub`, is none of them",
    merged_axes: "'norm' follows `reshape`, which splits, merges or reorders",
    after_product: "'norm' follows `dot_general` of two values that depend",
    per_example: "'norm' uses its running statistics in `",
    on_constant_kernel: "'norm' follows a layer whose kernel is a constant",
}


@pytest.mark.parametrize("call", list(REFUSALS), ids=lambda call: call.__name__)
def test_refuses_and_keeps(call):
    model, x = Dictated(call), normal(4, 3)
    variables = initialized(model, x)
    with pytest.raises(ValueError, match=re.escape(REFUSALS[call])):
        fold(model.apply, variables, x)
    folded = fold(model.apply, variables, x, on_unfoldable="keep")
    assert REFUSALS[call] in " ".join(
        f"{layer.norm!r} {layer.reason}" for layer in folded.layers
    )
    assert any("batch_stats" in name for name in folded.params)
    assert folded.max_difference.relative < 1e-6


def test_names_every_layer_that_does_not_fold():
    def preactivated(x):
        for i in range(2):
            y = dense(nn.relu(norm(f"first{i}")(x)), f"wide{i}")
            x = x + dense(nn.relu(norm(f"second{i}")(y)), f"narrow{i}")
        return x

    model, x = Dictated(preactivated), normal(4, 3)
    variables = initialized(model, x)
    with pytest.raises(ValueError) as info:
        fold(model.apply, variables, x)
    assert str(info.value).splitlines() == [
        "2 of 4 normalizations cannot be folded:",
        "BatchNorm 'first0' normalizes an input: no layer stands in front of it.",
        "BatchNorm 'first1' follows `add` of two values that depend on the "
        "input.",
        'on_unfoldable="keep" leaves them as they are.',
    ]
    folded = fold(model.apply, variables, x, on_unfoldable="keep")
    assert [layer.norm for layer in folded.layers if layer.kernel] == [
        "second0",
        "second1",
    ]
    left = {name for name in folded.params if "batch_stats" in name}
    assert left == {
        f"batch_stats/first{i}/{name}"
        for i in range(2)
        for name in ("mean", "var")
    }
    count = primitives(jax.make_jaxpr(folded.apply)(folded.params, x))
    assert count["rsqrt"] == 2


@pytest.mark.parametrize("module", [BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("returns_statistics", [True, False])
def test_training_mode_is_told_apart(module, returns_statistics):
    model = Pair(
        functools.partial(nn.Conv, 3, (3, 3)),
        functools.partial(module, use_running_average=False),
    )
    x = normal(2, 4, 4, 3)

    def apply(v, x):
        y, new = model.apply(v, x, mutable=["batch_stats"])
        return (y, new) if returns_statistics else y

    with pytest.raises(
        ValueError, match="'norm' is in training mode.*train=False"
    ):
        fold(apply, initialized(model, x), x)


def test_one_example_does_not_look_like_a_weight():
    model, x = Dictated(after_skip), normal(1, 3)
    with pytest.raises(ValueError, match="follows `add` of two values"):
        fold(model.apply, initialized(model, x), x)


def test_half_a_normalization_stays_whole():
    def apply(v, x):
        y = jax.nn.relu(x @ v["kernel"] - v["mean"])
        return y * jax.lax.rsqrt(v["var"])

    v = dict(kernel=normal(3, 2), mean=normal(2), var=np.float32([2, 3]))
    folded = fold(apply, v, normal(4, 3), on_unfoldable="keep")
    assert set(folded.params) == set(v)
    (layer,) = folded.layers
    assert layer.reason.startswith("follows `relu`")


def test_reshape_tells_features_from_examples_as_many():
    def apply(v, x):
        y = (x @ v["weight"]).reshape(5, 1, 5)
        return (y - v["mean"]) * jax.lax.rsqrt(v["var"])

    v = dict(weight=normal(3, 5), mean=normal(5), var=np.float32(range(1, 6)))
    folded = fold(apply, v, normal(5, 3))
    assert set(folded.params) == {"weight", "bias"}
    x = normal(5, 3, seed=2)
    assert_close(folded.apply(folded.params, x), apply(v, x))


def test_norm_that_is_not_called_is_no_obstacle():
    class TwoHeads(nn.Module):
        @nn.compact
        def __call__(self, x, both=True):
            y = norm("first")(dense(x, "a"))
            return (y, norm("second")(dense(x, "b"))) if both else y

    model, x = TwoHeads(), normal(4, 3)
    variables = initialized(model, x)
    folded = fold(functools.partial(model.apply, both=False), variables, x)
    assert [layer.norm for layer in folded.layers] == ["first"]
    assert set(folded.params) == {"params/a/kernel", "params/a/bias"}
    with pytest.raises(ValueError, match="calls none of the normalizations"):
        fold(lambda v, x: x @ v["params"]["a"]["kernel"], variables, x)


def test_reversed_features_are_not_mixed_up():
    def apply(v, x):
        y = x @ v["kernel"][:, ::-1]
        return (y - v["mean"]) * jax.lax.rsqrt(v["var"])

    v = dict(kernel=normal(3, 2), mean=normal(2), var=np.float32([2, 3]))
    with pytest.raises(ValueError, match="has no axis for the features alone"):
        fold(apply, v, normal(4, 3))


def test_imports_without_flax():
    script = (
        "import sys, jaxbn.fold\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'flax']\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_one_norm_behind_two_layers_folds_into_both():
    def call(x):
        module = norm()
        return nn.relu(module(dense(x, "a"))) + module(dense(x, "b"))

    model, x = Dictated(call), normal(4, 3)
    folded = fold(model.apply, initialized(model, x), x)
    assert [layer.kernel for layer in folded.layers] == [
        "params/a/kernel",
        "params/b/kernel",
    ]
    assert_no_norm_is_left(folded, x, products=2, joins=1)


class ContextTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()

        def call(x):
            x = nn.relu(norm("norm0")(nn.Conv(4, (3, 3), name="conv")(x)))
            return norm("norm1")(
                nn.remat(nn.Dense)(3, name="dense")(x.mean((1, 2)))
            )

        cls.model, cls.x = Dictated(call), normal(8, 5, 5, 3)
        cls.variables = initialized(cls.model, cls.x[:1])
        spec = jax.ShapeDtypeStruct((1, 5, 5, 3), jnp.float32)
        cls.folded = fold(cls.model.apply, cls.variables, spec)
        cls.original = staticmethod(jax.jit(cls.model.apply))
        cls.want = cls.original(cls.variables, cls.x)

    def test_other_shapes_and_transformations(self):
        apply, params, _, _ = self.folded
        for x in (self.x, self.x[:3], normal(2, 9, 4, 3)):
            assert_close(apply(params, x), self.original(self.variables, x))
        each = self.x[:, None]
        assert_close(jax.vmap(apply, (None, 0))(params, each)[:, 0], self.want)
        scan = jax.lax.scan(lambda _, x: (None, apply(params, x)), None, each)
        assert_close(scan[1][:, 0], self.want)

    def test_trace_is_cached(self):
        count = 0

        def apply(v, x):
            nonlocal count
            count += 1
            return self.model.apply(v, x)

        folded = fold(apply, self.variables, self.x[:1])
        before = count
        for _ in range(3):
            folded.apply(folded.params, self.x)
        assert count == before + 1

    @parameterized.parameters(True, False)
    def test_shard_map(self, check_vma):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        run = jax.shard_map(
            self.folded.apply,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        assert_close(jax.jit(run)(self.folded.params, self.x), self.want)

    def test_export_with_any_batch_size(self):
        batch, height = jax.export.symbolic_shape("batch, height")
        exported = jax.export.export(self.folded.apply)(
            jax.eval_shape(lambda params: params, self.folded.params),
            jax.ShapeDtypeStruct((batch, height, 5, 3), jnp.float32),
        )
        assert_close(exported.call(self.folded.params, self.x), self.want)

    def test_derivatives(self):
        apply, params, _, _ = self.folded
        cotangent = normal(8, 3)

        def slopes(model, *arguments):
            def loss(*arguments):
                return (model(*arguments) * cotangent).sum()

            return jax.jit(jax.grad(loss, (0, 1)))(*arguments)

        new, got = slopes(apply, params, self.x)
        old, want = slopes(self.model.apply, self.variables, self.x)
        assert_close(got, want)
        # With an affine model the slope is what the kernel was scaled by.
        slope = self.variables["params"]["norm1"]["scale"] / np.sqrt(
            self.variables["batch_stats"]["norm1"]["var"] + 1e-5
        )
        assert_close(
            new["params/dense/kernel"] * slope,
            old["params"]["dense"]["kernel"],
        )

    def test_gradients_in_float64(self):
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda a: np.asarray(a, np.float64),
                (self.variables, self.x[:2]),
            )
            folded = fold(self.model.apply, *wide)
            run = functools.partial(folded.apply, folded.params)
            jax.test_util.check_grads(
                run, wide[1:], order=1, modes=("fwd", "rev")
            )


def test_derivative_of_relu_stays_its_own():
    model = Dictated(lambda x: nn.relu(norm()(dense(x))))
    x = np.zeros((2, 3), np.float32)
    variables = model.init(jax.random.key(0), x)  # returns exact zeros
    folded = fold(model.apply, variables, x)
    slope = jax.grad(lambda p: folded.apply(p, x).sum())(folded.params)
    np.testing.assert_array_equal(slope["params/layer/bias"], np.zeros(3))


def test_nested_inputs_outputs_and_integers():
    model = Dictated(lambda x: norm()(dense(x)))
    example = {"x": normal(2, 3), "row": np.array([1, 0])}
    variables = initialized(model, example["x"])

    def apply(v, batch, factor):
        y = model.apply(v, batch["x"][batch["row"]])
        return {"y": y * factor, "top": jnp.argmax(y, -1)}, None

    folded = fold(apply, variables, example, 2.0)
    got, nothing = folded.apply(folded.params, example, 2.0)
    want, _ = apply(variables, example, 2.0)
    assert nothing is None
    assert_close(got["y"], want["y"])
    np.testing.assert_array_equal(got["top"], want["top"])


def test_own_derivatives_of_other_functions_stay():
    @jax.custom_jvp
    def slanted(x, slope):
        return jnp.where(x > 0, x, slope * x)

    @slanted.defjvp
    def _(primals, tangents):
        return slanted(*primals), 7.0 * tangents[0]

    model = Dictated(lambda x: norm()(dense(x)))
    x = normal(2, 3)
    variables = initialized(model, x) | {"slope": jnp.float32(0.1)}

    def apply(v, x):
        slope = v["slope"]
        v = {k: v[k] for k in ("params", "batch_stats")}
        return slanted(model.apply(v, x), slope)

    folded = fold(apply, variables, x)
    assert set(folded.params) == {
        "params/layer/kernel",
        "params/layer/bias",
        "slope",
    }
    slope = jax.grad(lambda x: folded.apply(folded.params, x).sum())(x)
    kernel = folded.params["params/layer/kernel"]
    assert_close(slope, 7 * np.tile(kernel.sum(1), (2, 1)))


class ErrorTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.model, self.x = Dictated(lambda x: norm()(dense(x))), normal(4, 3)
        self.variables = initialized(self.model, self.x)

    def test_arguments(self):
        apply, v, x = self.model.apply, self.variables, self.x
        for message, call in {
            'on_unfoldable must be "raise" or "keep"; got "skip"': (
                lambda: fold(apply, v, x, on_unfoldable="skip")
            ),
            "an example of every input": lambda: fold(apply, v),
            "outside of jax.jit": lambda: jax.jit(
                lambda v: fold(apply, v, x).params
            )(v),
            "variables hold no running statistics": lambda: fold(
                apply, {"params": v["params"]}, x
            ),
            "apply returns nothing floating": lambda: fold(
                lambda v, x: apply(v, x).argmax(-1), v, x
            ),
            "apply is not finite": lambda: fold(
                lambda v, x: jnp.log(apply(v, x)), v, x
            ),
        }.items():
            with self.subTest(message):
                message = re.escape(message).replace('"skip"', "'skip'")
                with pytest.raises(ValueError, match=message):
                    call()

    def test_tolerance(self):
        with pytest.raises(
            ValueError,
            match="differs from the original by .*tolerance of 1.0e-12",
        ):
            fold(self.model.apply, self.variables, self.x, tolerance=1e-12)

    def test_parameters_of_another_model(self):
        folded = fold(self.model.apply, self.variables, self.x)
        assert isinstance(folded, Folded)
        with pytest.raises(
            ValueError, match=r"params lack \['params/layer/bias'\]"
        ):
            folded.apply(
                {k: folded.params[k] for k in sorted(folded.params)[1:]}, self.x
            )

    @parameterized.parameters("literal", "another program")
    def test_program_that_depends_on_the_shape(self, kind):
        def apply(v, x):
            y = dense_and_norm(v, x / 1.0)
            return y if len(x) == 4 else jax.nn.relu(y)

        def dense_and_norm(v, x):
            y = x @ v["kernel"]
            y = y / len(x) if kind == "literal" or len(x) == 4 else y
            return (y - v["mean"]) / jnp.sqrt(v["var"])

        v = dict(kernel=normal(3, 2), mean=np.ones(2), var=np.full(2, 2.0))
        v = jax.tree.map(np.float32, v)
        folded = fold(apply, v, self.x)
        with pytest.raises(ValueError, match="inputs of these shapes"):
            folded.apply(folded.params, self.x[:2])
