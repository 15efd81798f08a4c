"""Diagnostics of a linen model, by its own gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn import diagnostics


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def added(params, step, direction):
    return jax.tree.map(lambda p, d: p + step * d, params, direction)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8, name="hidden")(x)
        x = jaxbn.linen.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3, name="head")(nn.tanh(x))


def test_a_linen_model():
    """Same numbers as from the model's own gradients; its state is as was."""
    model = Net()
    x = jax.random.normal(jax.random.key(0), (12, 5))
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(1), x
    )
    variables = jax.tree.map(lambda a: a.astype(float), variables)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, batch_stats, batch):
        x, labels = batch
        logits, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        log_p = jax.nn.log_softmax(logits)
        return -log_p[jnp.arange(12), labels].mean(), new["batch_stats"]

    @jax.jit
    def measured(params, stats, batch):
        slope = jax.value_and_grad(loss, has_aux=True)
        gradient = slope(params, stats, batch)[1]
        new = added(params, -0.1, gradient)
        (there, written), _ = slope(new, stats, batch)
        args = loss, params, stats, batch
        steps = jnp.array([1e-4, 2e-4, 0.1])
        shift = diagnostics.internal_covariate_shift(
            loss, params, new, stats, batch, order=("hidden", "head")
        )
        return (
            diagnostics.gradient_line(*args, steps=steps),
            diagnostics.max_step(*args, steps=steps),
            diagnostics.sharpness(*args),
            shift,
            (there, gradient, written),
        )

    kept = jax.tree.map(np.array, stats)
    batch = x, jnp.arange(12) % 3
    line, largest, sharp, shift, own = measured(params, stats, batch)
    there, gradient, written = own
    np.testing.assert_allclose(line.loss[2], there, rtol=1e-12)
    norm = np.linalg.norm(vector(gradient))
    np.testing.assert_allclose(line.gradient_norm, norm, rtol=1e-12)
    assert largest == 0.1
    # L(p - t g) = L - t g g + t^2 / 2 g H g + O(t^3).
    t = np.array([1e-4, 2e-4])
    bend = line.loss[:2] - line.loss0 + t * norm**2
    curvature = 2 * bend / (t * norm) ** 2
    np.testing.assert_allclose(
        sharp.along_gradient, 2 * curvature[0] - curvature[1], rtol=1e-3
    )
    assert shift.l2[0] < 1e-15 and 0 < shift.relative[1] < 1
    # The loss does write statistics; nothing of it reached the model.
    jax.tree.map(np.testing.assert_array_equal, stats, kept)
    assert (vector(written) != vector(kept)).all()
