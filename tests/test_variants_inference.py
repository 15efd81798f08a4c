"""Variants of inference, in linen and nnx, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.helpers.variants import (
    CONTEXTS,
    EPSILON,
    KINDS,
    C,
    N,
    assert_running,
    batches,
)

pytestmark = pytest.mark.sample(2)


@pytest.fixture(scope="module")
def data():
    return batches()


@KINDS
def test_an_example_counts_in_its_own_inference(kind, data):
    x, keep = data[0][0], data[1][0]
    layer = kind(inference=jaxbn.ExampleWeight(0.2))
    state = layer.init(x) | dict(
        mean=jnp.array([1.0, 2.0, 3.0]), var=jnp.array([4.0, 1.0, 9.0])
    )
    y, new = layer(state, x, train=False, mask=keep)
    assert_running(new, (state["mean"], state["var"]))
    mean, var = (np.float64(state[k]) for k in ("mean", "var"))
    for i in range(N):
        values = np.float64(x[i])[keep[i, :, 0]]
        m, v = mean, var
        if len(values):  # the formula as the paper writes it
            m = 0.2 * values.mean(0) + 0.8 * mean
            v = 0.2 * (values**2).mean(0) + 0.8 * (var + mean**2) - m**2
        want = (x[i] - m) / np.sqrt(v + EPSILON)
        np.testing.assert_allclose(y[i], want, atol=1e-5)
    # In training it changes nothing.
    got, want = (one(state, x, mask=keep)[0] for one in (layer, kind()))
    np.testing.assert_array_equal(got, want)


@KINDS
@pytest.mark.parametrize("context", ["jit", "shard_map", "vmap", "Explicit"])
def test_adaptation_at_test_time(kind, context, data):
    x, keep = data[0][0], data[1][0]
    layer = kind(inference=jaxbn.Prior(10.0), axis_name="data")
    state = layer.init(x) | dict(
        mean=jnp.array([1.0, 2.0, 3.0]), var=jnp.array([4.0, 1.0, 9.0])
    )
    step = CONTEXTS[context](
        lambda state, x, keep: layer(state, x, train=False, mask=keep)
    )
    y, new = step(state, x, keep)
    assert_running(new, (state["mean"], state["var"]))
    values = np.float64(x)[keep[..., 0]]
    weight = len(values) / (len(values) + 10 * 4)  # 4 values an example
    m = weight * values.mean(0) + (1 - weight) * np.float64(state["mean"])
    v = weight * values.var(0) + (1 - weight) * np.float64(state["var"])
    np.testing.assert_allclose(y, (x - m) / np.sqrt(v + EPSILON), atol=1e-5)


@pytest.mark.parametrize(
    "axes, ids", [(-1, None), (1, None), (0, None), ((0, 3), None), (1, True)]
)
def test_example_weights_on_any_axes(axes, ids):
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (5, 6, 4, 3)).astype(np.float32)
    features = sorted(a % 4 for a in np.atleast_1d(axes))
    size = tuple(x.shape[a] for a in features)
    first = min(set(range(4)) - set(features))  # the axis of examples
    ids = None if ids is None else rng.integers(0, 2, x.shape[first])
    rows = size if ids is None else (2, *size)
    mean, var = rng.normal(size=rows), rng.uniform(1, 4, rows)
    scale, bias = rng.normal(size=(2, *rows))
    got = jaxbn.normalize_weighted(
        x,
        *(jnp.float32(a) for a in (mean, var, scale, bias)),
        weight=0.3,
        ids=ids,
        feature_axis=axes,
    )
    for i in range(x.shape[first]):
        one, out = (np.take(a, [i], first) for a in (np.float64(x), got))
        axis = tuple(set(range(4)) - set(features))
        m, v, s, b = (
            np.expand_dims(a if ids is None else a[ids[i]], axis)
            for a in (mean, var, scale, bias)
        )
        own = dict(axis=axis, keepdims=True)
        square = 0.3 * (one**2).mean(**own) + 0.7 * (v + m**2)
        m = 0.3 * one.mean(**own) + 0.7 * m
        want = (one - m) / np.sqrt(square - m**2 + EPSILON) * s + b
        np.testing.assert_allclose(out, want, atol=2e-5)


def test_weight_zero_is_inference_and_one_is_instance_norm(data):
    x = data[0][0]
    stats = jnp.full(C, 0.5), jnp.full(C, 4.0)
    got = jaxbn.normalize_weighted(x, *stats, weight=0.0)
    np.testing.assert_allclose(got, jaxbn.normalize(x, *stats), atol=1e-6)
    got = jaxbn.normalize_weighted(x, *stats, weight=1.0)
    wide = np.float64(x)
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(
        wide.var(1, keepdims=True) + EPSILON
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
