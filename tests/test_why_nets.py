"""Data and networks of the experiments on why batch norm works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbn import batch_norm
from train import UserError
from train import data as images
from train.why import data, gradient, nets
from train.why.data import Settings


@pytest.fixture(scope="module")
def digits():
    return data.load_data(Settings())


def test_data_is_standardized(digits):
    x, labels = digits.train
    assert x.shape == (1437, 64) and digits.num_classes == 10
    assert labels.shape == (1437,) and digits.test[0].shape == (360, 64)
    assert digits.sizes(5) == (64, 5, 10)
    assert x.dtype == np.float32
    assert abs(x.mean(dtype=np.float64)) < 1e-6
    assert abs(x.std(dtype=np.float64) - 1) < 1e-6
    # One unit for all pixels: those that are always white stay so.
    assert np.ptp(x[:, 0]) == 0
    with pytest.raises(UserError, match="'mnist'; choose digits or cifar10"):
        data.load_data(Settings(data="mnist"))


def test_cifar_is_averaged(monkeypatch):
    rng = np.random.default_rng(0)
    parts = [
        images.Split(
            rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
            rng.integers(0, 10, n, np.int32),
        )
        for n in (20, 5)
    ]
    asked = {}

    def load(name, **options):
        asked[name] = options
        return images.Dataset(*parts, 10)

    monkeypatch.setattr(images, "load_dataset", load)
    found = data.load_data(Settings(data="cifar10", data_dir="/d", quick=True))
    assert asked["cifar10"] == {
        "data_dir": "/d",
        "train_split": "train[:4000]",
        "test_split": "test[:1000]",
    }
    wide = [p.images.astype(np.float64) for p in parts]
    small = [
        (a[:, ::2] + a[:, 1::2])[:, :, ::2]
        + (a[:, ::2] + a[:, 1::2])[:, :, 1::2]
        for a in wide
    ]
    mean, std = small[0].mean((0, 1, 2)), small[0].std((0, 1, 2))
    want = ((small[1] - mean) / std).reshape(5, -1)
    np.testing.assert_allclose(found.test[0], want, atol=1e-4)
    assert found.train[0].shape == (20, 768)


def test_batches_are_epochs():
    rows = data.batch_indices(10, batch_size=3, steps=7, seed=5)
    assert rows.shape == (7, 3) and rows.dtype == np.int32
    for epoch in (rows[:3], rows[3:6]):
        assert len(set(epoch.ravel())) == 9
    np.testing.assert_array_equal(
        rows, data.batch_indices(10, batch_size=3, steps=9, seed=5)[:7]
    )
    assert (rows != data.batch_indices(10, batch_size=3, steps=7, seed=6)).any()


def reference(params, x, *, norm, epsilon=1e-5):
    """float64 numpy, sharing no code."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for layer in (*params["hidden"], params["head"]):
        x = x @ layer["kernel"]
        if layer is params["head"]:
            return x + layer["bias"]
        if norm:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + epsilon) * layer["scale"]
        x = np.maximum(x + layer["bias"], 0)


@pytest.mark.parametrize("norm", [batch_norm, None])
def test_nets_match_float64(norm):
    params = nets.init(jax.random.key(0), (5, 7, 6, 3), norm=norm)
    assert len(params["hidden"]) == 2
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), params
    )
    x = rng.normal(size=(16, 5)).astype(np.float32)
    out = jax.jit(functools.partial(nets.apply, norm=norm))(params, x)
    want = reference(params, x.astype(np.float64), norm=norm)
    np.testing.assert_allclose(out.logits, want, rtol=1e-4, atol=1e-5)
    assert len(out.preactivations) == 2 and len(out.moments) == (
        2 if norm else 0
    )

    @jax.jit
    def infer(params, x):
        """With the statistics of all, four of them."""
        known = nets.apply(params, x, norm=norm).moments
        return nets.apply(params, x[:4], norm=norm, statistics=known).logits

    again = infer(params, x)
    np.testing.assert_allclose(again, want[:4], rtol=1e-4, atol=1e-5)


def test_options_of_a_net():
    drawn = jax.random.key(3), (4, 40, 40, 3)
    plain, normed = (nets.init(*drawn, norm=n) for n in (None, batch_norm))
    for i in (0, 1):
        np.testing.assert_array_equal(
            plain["hidden"][i]["kernel"], normed["hidden"][i]["kernel"]
        )
    np.testing.assert_array_equal(
        *(n["head"]["kernel"] for n in (plain, normed))
    )
    assert {*plain["hidden"][0]} == {*normed["head"]} == {"kernel", "bias"}
    assert {*normed["hidden"][0]} == {"kernel", "bias", "scale"}
    options = {"norm": batch_norm, "affine": False}
    bare = gradient.init(*drawn, **options)
    assert {*bare["hidden"][1]} == {*bare["head"]} == {"kernel", "before"}
    affine = gradient.init(*drawn, **options | {"affine": True})
    assert {*affine["hidden"][1]} == {"kernel", "before", "scale", "bias"}
    assert {*affine["head"]} == {"kernel", "bias"}
    for gain, variance in (
        ("he", 2 / 40),
        ("lecun", 1 / 40),
        ("glorot", 1 / 40),
    ):
        kernel = nets.init(*drawn, gain=gain, factor=3.0)["hidden"][1]["kernel"]
        assert kernel.var() == pytest.approx(9 * variance, rel=0.1)
    x = jax.random.normal(jax.random.key(1), (32, 4))
    out = nets.apply(bare, x)
    np.testing.assert_allclose(out.logits.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(out.logits.var(0), 1, rtol=1e-3)
    doubled = nets.apply(plain, x, norm=None, between=lambda i, h: h * 2**i)
    want = nets.apply(plain, x, norm=None)
    np.testing.assert_allclose(
        doubled.preactivations[1], 2 * want.preactivations[1], rtol=1e-6
    )


def test_statistics_kept_out_of_the_gradient():
    """The same loss; of its gradient only the part with fixed statistics."""
    with jax.enable_x64(True):
        params = nets.init(jax.random.key(0), (4, 6, 3))
        rng = np.random.default_rng(0)
        batch = rng.normal(size=(8, 4)), rng.integers(0, 3, 8)
        assert params["head"]["kernel"].dtype == np.float64
        known = nets.apply(params, batch[0]).moments
        slopes = {}
        for name, options in {
            "full": {},
            "kept out": {"norm": gradient.keep_out},
            "constant": {"statistics": known},
        }.items():
            loss = nets.loss_on(jax.tree.map(jnp.asarray, batch), **options)
            slopes[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                params, np.arange(8)
            )
        values = [float(value[0]) for value, _ in slopes.values()]
        np.testing.assert_allclose(values, values[0], rtol=1e-12)
        full, kept_out, constant = (
            g["hidden"][0]["kernel"] for _, g in slopes.values()
        )
        np.testing.assert_allclose(kept_out, constant, rtol=1e-9)
        assert jnp.abs(full - kept_out).max() > 1e-3


def test_sgd_is_its_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=12)
    indices = data.batch_indices(12, batch_size=4, steps=5, seed=0)
    rates = np.array([0.1, 0.2, 0.1, 0.05, 0.3])

    def loss(w, index):
        error = jnp.array(x)[index] @ w - jnp.array(y)[index]
        return jnp.square(error).mean(), index[0]

    with jax.enable_x64(True):
        got, losses, kept = nets.train(
            loss,
            jnp.ones(3),
            indices,
            optax.chain(
                optax.add_decayed_weights(0.1),
                optax.sgd(lambda t: jnp.array(rates)[t], momentum=0.5),
            ),
            watch=lambda old, new, auxiliary: (old, new, auxiliary),
        )
    w, v, seen = np.ones(3), np.zeros(3), []
    for index, rate in zip(indices, rates):
        error = x[index] @ w - y[index]
        seen.append(np.square(error).mean())
        v = 0.5 * v + x[index].T @ error / 2 + 0.1 * w
        w = w - rate * v
    np.testing.assert_allclose(got, w, rtol=1e-12)
    np.testing.assert_allclose(losses, seen, rtol=1e-12)
    np.testing.assert_allclose(kept[0][1:], kept[1][:-1])
    np.testing.assert_allclose(kept[1][-1], w, rtol=1e-12)
    np.testing.assert_array_equal(kept[2], indices[:, 0])


def test_accuracy_of_what_is_not_finite():
    head = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    params = {"hidden": [], "head": head}
    logits = nets.apply(params, jnp.eye(3).at[2].set(jnp.nan)).logits
    right = nets.accuracy(logits, jnp.array([0, 2, 0]))
    assert right == pytest.approx(1 / 3)
