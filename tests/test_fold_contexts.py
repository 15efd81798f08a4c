"""Folded models on other shapes, under transformations, and elsewhere."""

import collections
import functools
import pickle

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn.fold import fold
from tests.helpers.folding import (
    Dictated,
    assert_close,
    dense,
    initialized,
    norm,
    normal,
)

pytestmark = pytest.mark.sample(2)


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


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (4, 6):
            x = nn.relu(norm(f"norm{width}")(nn.Conv(width, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


@functools.cache
def folded_classifier():
    model, x = Classifier(), normal(2, 6, 6, 3)
    variables = initialized(model, x)
    calls = []

    def apply(v, batch, factor):
        calls.append(batch)
        return {"logits": model.apply(v, batch["image"]) * factor}

    folded = fold(apply, variables, {"image": x}, 2.0)
    return folded, calls, {"image": x}


def test_program_that_was_verified_runs_without_the_model():
    folded, calls, batch = folded_classifier()
    before = len(calls)
    jax.clear_caches()
    folded.apply(folded.params, batch, 3.0)
    jax.jit(jax.vmap(folded.apply, (None, 0, None)))(
        folded.params, {"image": batch["image"][None]}, 2.0
    )
    assert len(calls) == before
    folded.apply(folded.params, {"image": normal(5, 6, 6, 3)}, 3.0)
    assert len(calls) == before + 1


def test_pickled_and_loaded_where_the_model_is_unknown():
    pytest.importorskip("flatbuffers")
    folded, _, _ = folded_classifier()
    batch = {"image": normal(5, 6, 6, 3)}  # another number of examples
    again = pickle.loads(pickle.dumps(folded))
    assert again.layers == folded.layers
    want = folded.apply(folded.params, batch, 2.0)["logits"]
    got = again.apply(again.params, batch, 2.0)["logits"]
    assert_close(got, want, 1e-6)

    def slope(folded):
        def loss(params):
            return (folded.apply(params, batch, 2.0)["logits"] ** 2).sum()

        return jax.grad(loss)(folded.params)

    third = pickle.loads(pickle.dumps(again))
    jax.tree.map(assert_close, slope(third), slope(folded))
    with pytest.raises(ValueError, match="takes the shapes that it was folded"):
        again.apply(again.params, {"image": normal(5, 7, 6, 3)}, 2.0)
    with pytest.raises(ValueError, match="inputs must be nested as"):
        again.apply(again.params, batch["image"], 2.0)


def test_serialized_by_jax_export():
    pytest.importorskip("flatbuffers")
    folded, calls, batch = folded_classifier()
    before = len(calls)
    exported = jax.export.export(folded.apply)(folded.params, batch, 2.0)
    assert len(calls) == before
    loaded = jax.export.deserialize(exported.serialize())
    want = folded.apply(folded.params, batch, 2.0)["logits"]
    got = loaded.call(folded.params, batch, 2.0)["logits"]
    assert_close(got, want, 1e-6)


def test_exported_to_onnx():
    jax2onnx = pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    folded, _, batch = folded_classifier()

    def logits(image):
        return folded.apply(folded.params, {"image": image}, 2.0)["logits"]

    x = batch["image"]
    model = jax2onnx.to_onnx(logits, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == 2
    assert not {"BatchNormalization", "Sqrt", "Sub"} & kinds.keys()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    assert_close(got, logits(x))
