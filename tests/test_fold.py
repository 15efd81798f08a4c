"""Batch normalization folded into the layers in front of it."""

import collections
import functools
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

import jaxbn.nnx
from jaxbn.fold import fold
from jaxbn.linen import BatchNorm
from tests.helpers.folding import (
    EPSILON,
    NORMS,
    Pair,
    assert_close,
    assert_no_norm_is_left,
    initialized,
    normal,
    primitives,
    randomized,
)
from train.resnet import ResNet

pytestmark = pytest.mark.sample(3)

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

    def test_a_scale_that_is_a_product_of_variables(self):
        """Whatever jax.default_matmul_precision the program is traced with."""

        def apply(v, x):
            y = x @ v["w"] * (v["embedding"] @ v["to_scale"]) - v["mean"]
            return y / jnp.sqrt(v["var"] + EPSILON)

        v = dict(w=normal(4, 5), embedding=normal(2), to_scale=normal(2, 5))
        v |= dict(mean=normal(5), var=normal(5) ** 2)
        folded = fold(apply, v, normal(3, 4))
        wide = {k: np.float64(a) for k, a in v.items()}
        slope = 1 / np.sqrt(wide["var"] + EPSILON)
        kernel = wide["w"] * (wide["embedding"] @ wide["to_scale"]) * slope
        assert_close(folded.params["w"], kernel)
        assert_close(folded.params["w_bias"], -wide["mean"] * slope)
        x = normal(7, 4)
        for precision in ("default", "highest"):
            with jax.default_matmul_precision(precision):
                y = folded.apply(folded.params, x)
            assert_close(y, x @ kernel - wide["mean"] * slope)


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
