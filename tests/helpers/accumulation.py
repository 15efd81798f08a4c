"""A small network with batch norm, in one batch and in microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import accumulate

N, CHANNELS, LAYERS = 32, 4, 2
EPSILON, DECAY = 1e-5, 0.9
BOTH = ("data", "micro")

# Most of the time here goes into compilation.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def plain_norm(x, scale, bias, keep):
    """The formula over all examples of one array, for autodiff."""
    axes = tuple(range(x.ndim - 1))
    n = jnp.broadcast_to(keep, x.shape).sum(axes)
    mean = jnp.where(keep, x, 0).sum(axes) / n
    var = jnp.where(keep, jnp.square(x - mean), 0).sum(axes) / n
    y = (x - mean) / jnp.sqrt(var + EPSILON)
    return y * scale + bias, (mean, var)


def jaxbn_norm(axis_name, x, scale, bias, keep, **options):
    y, batch = jaxbn.batch_norm(
        x, scale, bias, where=keep, axis_name=axis_name, **options
    )
    return y, (batch.mean, batch.var)


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def dense(x, w):
    return x @ w


def loss_of(norm, mix=dense, total=lambda x: x):
    """loss(params, stats, batch) -> (value, (stats, outputs))."""

    def loss(params, stats, batch):
        x, cotangent, keep = batch
        new = []
        for (w, scale, bias), old in zip(params, stats):
            x, found = norm(mix(x, w), scale, bias, keep)
            x = jnp.sin(x)
            new.append(
                [DECAY * a + (1 - DECAY) * b for a, b in zip(old, found)]
            )
        count = total(keep.sum()).astype(x.dtype)
        losses = jnp.where(keep, x * cotangent, 0)
        return total(losses.sum()) / count, (new, x)

    return loss


def over(axis_name):
    return lambda x: jax.lax.psum(x, axis_name)


def problem(mix=dense, dtype=np.float64, seed=0, offset=0.0):
    """(params, stats, batch): of 8 parts of the batch one keeps nothing."""
    rng = np.random.default_rng(seed)
    inner = (5, 5) if mix is conv else ()
    kernel = (3, 3) if mix is conv else ()
    x, cotangent = rng.normal(1, 2, (2, N, *inner, CHANNELS))
    x = x + offset
    keep = rng.random((N, *(1 for _ in inner), 1)) < 0.6
    keep[:2] = True
    # Whatever is cut, by neighbours or by stride, has unlike counts.
    keep[4::8] = keep[8:12] = False
    params = [
        (
            rng.normal(0, 0.5, (*kernel, CHANNELS, CHANNELS)),
            rng.normal(1, 0.3, CHANNELS),
            rng.normal(0, 0.3, CHANNELS),
        )
        for _ in range(LAYERS)
    ]
    stats = [[np.zeros(CHANNELS), np.ones(CHANNELS)] for _ in range(LAYERS)]
    cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
    return cast(params), cast(stats), (*cast((x, cotangent)), keep)


@functools.cache
def expected(mix=dense, offset=0.0):
    """Value, aux and gradients of the whole batch in float64."""
    with jax.enable_x64(True):
        step = jax.value_and_grad(loss_of(plain_norm, mix), has_aux=True)
        return jax.device_get(jit(step)(*problem(mix, offset=offset)))


def in_rows(got):
    """Puts what comes a microbatch at a time in the order of the batch."""
    (value, (stats, out)), grads = got
    out = out.swapaxes(0, 1).reshape(N, *out.shape[2:])
    return (value, (stats, out)), grads


def assert_close(got, want, tolerance):
    def close(got, want):
        np.testing.assert_allclose(
            np.asarray(got, np.float64),
            want,
            rtol=0,
            atol=tolerance * np.abs(want).max(),
        )

    jax.tree.map(close, got, want)


def exact_step(mix=dense, axis_name="micro", **options):
    norm = functools.partial(jaxbn_norm, axis_name)
    options = dict(microbatches=4, has_aux=True) | options
    return accumulate.value_and_grad(
        loss_of(norm, mix, over(axis_name)), **options
    )
