"""Microbatches together give what the whole batch gives."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import accumulate
from jaxbn.linen import BatchNorm
from tests.helpers.accumulation import (
    BOTH,
    CHANNELS,
    DECAY,
    assert_close,
    conv,
    exact_step,
    expected,
    in_rows,
    jaxbn_norm,
    jit,
    loss_of,
    over,
    plain_norm,
    problem,
)
from train.resnet import ResNet


def test_convolutions_equal_the_whole_batch():
    step = exact_step(conv, microbatches=2)
    with jax.enable_x64(True):
        got = jit(step)(*problem(conv))
    assert_close(in_rows(got), expected(conv), 1e-10)


@pytest.mark.parametrize(
    "microbatches", [1, pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_number_of_microbatches(microbatches):
    step = jit(exact_step(microbatches=microbatches))
    with jax.enable_x64(True):
        got = step(*problem())
        assert_close(in_rows(got), expected(), 1e-12)
    if microbatches == 4:
        got = step(*problem(dtype=np.float32))
        assert got[1][0][0].dtype == jnp.float32
        assert_close(in_rows(got), expected(), 1e-5)


def test_sums_that_are_taken_again():
    """Far from the shift: a branch that reduces over the microbatches."""
    step = jit(exact_step())
    with jax.enable_x64(True):
        got = step(*problem(offset=1e3))
    assert_close(in_rows(got), expected(offset=1e3), 1e-8)
    got = step(*problem(offset=1e3, dtype=np.float32))
    assert_close(got[0][0], expected(offset=1e3)[0][0], 1e-3)


def test_mean_of_means_where_counts_are_equal():
    """A loss that does not know of microbatches."""

    def loss(norm, params, stats, batch):
        value, (stats, _) = loss_of(norm)(params, stats, batch)
        return value + jnp.square(params[0][0]).sum(), stats

    micro = functools.partial(jaxbn_norm, "micro")
    with jax.enable_x64(True):
        params, stats, (x, cotangent, keep) = problem()
        batch = x, cotangent, np.ones_like(keep)
        got, want = (
            jit(step(functools.partial(loss, norm), has_aux=True))(
                params, stats, batch
            )
            for step, norm in (
                (jax.value_and_grad, plain_norm),
                (
                    functools.partial(
                        accumulate.value_and_grad, microbatches=4
                    ),
                    micro,
                ),
            )
        )
        assert_close(got, want, 1e-12)


def resnet():
    """Losses of ResNet-8 without and with an axis, and their arguments.

    In float64 but for the logits, which the network rounds to float32.
    """

    def loss_with(axis_name):
        norm = functools.partial(BatchNorm, momentum=0.9, axis_name=axis_name)
        model = ResNet(8, num_classes=3, width=2, norm=norm, dtype=jnp.float64)

        def loss(params, batch_stats, batch):
            images, labels = batch
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            return -losses.mean(), (updates["batch_stats"], logits)

        return model, loss

    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 8, 8, 3))
    labels = rng.integers(0, 3, 12)
    model, loss = loss_with(None)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    variables = jax.tree.map(lambda a: rng.normal(1, 0.5, a.shape), shapes)
    arguments = variables["params"], variables["batch_stats"], (images, labels)
    return loss, loss_with("micro")[1], arguments


def test_resnet():
    with jax.enable_x64(True):
        loss, in_microbatches, arguments = resnet()
        want = jit(jax.value_and_grad(loss, has_aux=True))(*arguments)
        step = accumulate.value_and_grad(
            in_microbatches, microbatches=3, has_aux=True
        )
        (value, (stats, logits)), grads = jit(step)(*arguments)
        logits = logits.swapaxes(0, 1).reshape(12, 3)
        got = jax.device_get(((value, (stats, logits)), grads))
    assert_close(got, want, 1e-6)


def loops_and_checkpoints(axis_name, params, batch):
    x, cotangent, keep = batch
    total = over(axis_name) if axis_name else lambda x: x

    @jax.checkpoint
    def block(layers, x):
        for w, scale, bias in layers:
            x, _ = jaxbn.batch_norm(
                x @ w, scale, bias, where=keep, axis_name=axis_name
            )
            x = jnp.sin(x)
        return x

    def step(x, _):
        x = jnp.sin(x @ params[0][0])
        return x, x.sum(-1)

    x, sums = jax.lax.scan(step, block(params[:2], x), length=2)
    x = jax.lax.cond(params[0][1][0] > 0, jnp.sin, jnp.cos, x)
    x = x + jax.lax.fori_loop(
        0, 2, lambda _, x: x * x, jax.lax.stop_gradient(x)
    )
    x = block(params[1:], x)
    sums = total(jnp.where(keep, x * cotangent, 0).sum() + sums.sum())
    return sums / total(keep.sum())


@pytest.mark.parametrize("check_vma", (None, True))
def test_loops_and_checkpoints(check_vma):
    with jax.enable_x64(True):
        params, _, batch = problem()
        loss = functools.partial(loops_and_checkpoints, None)
        want = jit(jax.value_and_grad(loss))(params, batch)
        axis_name = BOTH if check_vma else "micro"
        step = accumulate.value_and_grad(
            functools.partial(loops_and_checkpoints, axis_name), microbatches=2
        )
        if check_vma:
            mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
            step = jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
            )
        assert_close(jit(step)(params, batch), want, 1e-12)


def test_gradients_add_up_in_float32():
    """In bfloat16, 256 + 1 is 256."""

    def loss(w, x):
        return (w * x).sum() * jax.lax.psum(1.0 + 0 * x.sum(), "micro") / 64

    x = jnp.ones(64, jnp.float32).at[0].set(256)
    step = accumulate.value_and_grad(loss, microbatches=64)
    _, grad = jit(step)(jnp.ones((), jnp.bfloat16), x)
    assert grad.dtype == jnp.bfloat16
    assert float(grad) == float(jnp.bfloat16(319 / 64))


def test_several_arguments_are_differentiated():
    def loss(w, b, x):
        return jax.lax.pmean((w["w"] * x + b).mean(), "micro")

    step = accumulate.value_and_grad(loss, microbatches=2, argnums=(0, 1))
    _, (w, b) = step({"w": jnp.ones(())}, jnp.ones(()), jnp.arange(4.0))
    assert (float(w["w"]), float(b)) == (1.5, 1.0)


class Layer(nn.Module):
    axis_name: tuple[str, ...]

    @nn.compact
    def __call__(self, x, _):
        norm = BatchNorm(
            use_running_average=False,
            momentum=DECAY,
            axis_name=self.axis_name,
            param_dtype=x.dtype,
        )
        h = norm(nn.Dense(CHANNELS, use_bias=False, param_dtype=x.dtype)(x))
        return x + jnp.sin(h), h.sum(-1)


@pytest.mark.parametrize(
    "check_vma", [pytest.param(None, marks=pytest.mark.slow), True]
)
def test_scanned_layers(check_vma):
    names = ("micro",) if check_vma is None else BOTH

    def model(axis_name):
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(axis_name)

    def loss(axis_name, params, batch_stats, batch):
        x, cotangent, _ = batch
        (y, sums), new = model(axis_name).apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            None,
            mutable=["batch_stats"],
        )
        value = (y * cotangent).mean() + jnp.square(sums).mean()
        if axis_name:
            value = jax.lax.pmean(value, axis_name)
        return value, new["batch_stats"]

    with jax.enable_x64(True):
        _, _, batch = problem()
        variables = model(()).init(jax.random.key(0), batch[0], None)
        arguments = variables["params"], variables["batch_stats"], batch
        want = jax.value_and_grad(functools.partial(loss, ()), has_aux=True)
        step = accumulate.value_and_grad(
            functools.partial(loss, names), microbatches=2, has_aux=True
        )
        if check_vma:
            mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
            step = jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
            )
        want_value, want_grads = jit(want)(*arguments)
        got = jit(step)(*arguments)
    assert_close(got[0], jax.device_get(want_value), 1e-12)
    assert_close(got[1], jax.device_get(want_grads), 1e-10)


def test_python_values():
    """Numbers are differentiated, flags stay flags, as with jax.grad."""

    def loss(params, train, mode, x):
        assert train is True and mode == "linear"
        slope, offset = params
        return jax.lax.pmean((slope * x + offset).mean(), "micro")

    step = accumulate.value_and_grad(loss, microbatches=2)
    x = np.arange(4, dtype=np.float32)
    value, grads = step([2.0, 1.0], True, "linear", x)
    assert (float(value), list(map(float, grads))) == (4.0, [1.5, 1.0])


@pytest.mark.parametrize("exact", (True, False))
def test_examples_with_keys(exact):
    """Noise of an example's own, whatever the microbatch."""

    def loss(w, batch):
        noise = jax.vmap(jax.random.normal)(batch["key"])
        losses = jnp.square(w * batch["x"] + noise)
        value = losses.mean()
        if exact:
            value = jax.lax.pmean(value, "micro")
        return value, jax.vmap(jax.random.split)(batch["key"])

    w = jnp.float32(2)
    keys = jax.random.split(jax.random.key(0), 6)
    batch = {"x": jnp.arange(6.0), "key": keys}
    step = accumulate.value_and_grad(
        loss, microbatches=3, has_aux=True, exact=exact
    )
    (value, split), grad = jit(step)(w, batch)
    noise = jax.device_get(jax.vmap(jax.random.normal)(keys))
    y = 2 * np.arange(6.0) + noise
    np.testing.assert_allclose(value, np.square(y).mean(), rtol=1e-5)
    np.testing.assert_allclose(grad, (2 * y * np.arange(6.0)).mean(), rtol=1e-5)
    assert split.shape == (3, 2, 2)
    want = jax.random.key_data(jax.vmap(jax.random.split)(keys))
    got = jax.random.key_data(split.swapaxes(0, 1).reshape(6, 2))
    np.testing.assert_array_equal(got, want)
