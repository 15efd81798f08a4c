"""What does not fold, and what is said of it."""

import functools
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from absl.testing import parameterized

import jaxbn
from jaxbn.fold import Folded, fold
from jaxbn.linen import BatchNorm
from tests.helpers.folding import (
    Dictated,
    Pair,
    assert_close,
    assert_no_norm_is_left,
    dense,
    initialized,
    norm,
    normal,
    primitives,
)


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
    return dense(nn.relu(norm()(x)))


def before_padding(x):
    return nn.Conv(3, (3,), name="layer")(norm()(x)[:, None])


def before_two_layers(x):
    y = norm()(x)
    return dense(y, "a") + dense(y, "b")


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
    return BatchNorm(
        use_running_average=True, sharing=jaxbn.Scope(num_ids=3), name="norm"
    )(dense(x), ids=ids)


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
    on_input: "'norm' normalizes an input: no layer precedes it",
    before_padding: ("'norm' normalizes an input: no layer precedes it"),
    before_two_layers: "'norm' normalizes an input: no layer precedes",
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
        "BatchNorm 'first0' normalizes an input: no layer precedes it.",
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
