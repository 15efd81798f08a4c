"""One module object in every context, with derivatives of every kind."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]

N, CHANNELS, STEPS = 16, 3, 2
MODULE = BatchNorm(axis_name="data", use_running_average=False)


# Of the mean, in standard deviations from the running mean: where one pass of
# sums does, and where a second one is taken.
DISTANCES = (0.5, 100.0)


def draw(distance):
    """x, cotangent and direction; keep; the affine parameters."""
    rng = np.random.default_rng(0)
    shape = (N, 2, CHANNELS)
    x, cotangent, direction = rng.normal(1, 2, (3, *shape)).astype(np.float32)
    x = x + np.float32(2 * distance - 1)
    keep = rng.random((N, 2, 1)) < 0.6
    keep[:2] = False  # of eight devices the first has nothing
    scale, bias = rng.normal(1, 0.5, (2, CHANNELS)).astype(np.float32)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    return (x, cotangent, direction, keep), params


def module_norm(params, x, keep):
    stats = {"mean": jnp.zeros(CHANNELS), "var": jnp.ones(CHANNELS)}
    variables = {"params": params, "batch_stats": stats}
    y, _ = MODULE.apply(variables, x, mask=keep, mutable=["batch_stats"])
    return y


def plain_norm(params, x, keep):
    """The formula, for autodiff in float64 on one device."""
    n = keep.sum() * x.shape[1] / keep.shape[1]
    mean = jnp.where(keep, x, 0).sum((0, 1)) / n
    var = jnp.where(keep, jnp.square(x - mean), 0).sum((0, 1)) / n
    y = (x - mean) / jnp.sqrt(var + 1e-5)
    return y * params["scale"] + params["bias"]


def all_kinds(norm, params, x, cotangent, direction, keep):
    """Value and derivatives as arrays of the shape of x."""

    def loss(x):
        return (jnp.sin(norm(params, x, keep)) * cotangent).sum()

    def turn(x):
        return (jax.grad(loss)(x) * direction).sum()

    value = functools.partial(norm, params, keep=keep)
    grad, forward_over_reverse = jax.jvp(jax.grad(loss), (x,), (direction,))
    return {
        "value": value(x),
        "grad": grad,
        "jvp": jax.jvp(value, (x,), (direction,))[1],
        "forward over reverse": forward_over_reverse,
        "reverse over reverse": jax.grad(turn)(x),
    }


OURS = functools.partial(all_kinds, module_norm)


def mesh_of(sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def eager(params, arrays):
    return OURS(params, *arrays)


def jit(params, arrays):
    return jax.jit(OURS)(params, *arrays)


def global_jit(params, arrays, kind):
    mesh = mesh_of((8,), ("data",), kind)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(arrays, NamedSharding(mesh, P("data")))
        return jax.jit(OURS)(params, *arrays)


def shard_map(params, arrays, *, check_vma=True, sizes=(8,), names=("data",)):
    return jax.jit(
        jax.shard_map(
            OURS,
            mesh=mesh_of(sizes, names),
            in_specs=(P(), *[P("data")] * 4),
            out_specs=P("data"),
            check_vma=check_vma,
        )
    )(params, *arrays)


def split(arrays):
    return [a.reshape(8, -1, *a.shape[1:]) for a in arrays]


def joined(out):
    return jax.tree.map(lambda a: a.reshape(N, *a.shape[2:]), out)


def pmap(params, arrays):
    run = jax.pmap(OURS, "data", in_axes=(None, 0, 0, 0, 0))
    return joined(run(params, *split(arrays)))


def vmap(params, arrays):
    run = jax.vmap(OURS, (None, 0, 0, 0, 0), axis_name="data")
    return joined(jax.jit(run)(params, *split(arrays)))


def scan(params, arrays):
    """Several batches, one after the other, on eight devices."""

    def steps(params, *arrays):
        batches = [jnp.stack([a] * STEPS) for a in arrays]
        body = lambda carry, batch: (carry, OURS(params, *batch))  # noqa: E731
        _, out = jax.lax.scan(body, None, batches)
        return jax.tree.map(lambda a: a[-1], out)

    return jax.jit(
        jax.shard_map(
            steps,
            mesh=mesh_of((8,), ("data",)),
            in_specs=(P(), *[P("data")] * 4),
            out_specs=P("data"),
        )
    )(params, *arrays)


CONTEXTS = {
    "eager": eager,
    "jit": jit,
    "global jit, Auto": functools.partial(global_jit, kind=AxisType.Auto),
    "global jit, Explicit": functools.partial(
        global_jit, kind=AxisType.Explicit
    ),
    "shard_map": shard_map,
    "shard_map, check_vma=False": functools.partial(shard_map, check_vma=False),
    "shard_map, two axes": functools.partial(
        shard_map, sizes=(4, 2), names=("data", "model")
    ),
    "pmap": pmap,
    "vmap": vmap,
    "scan": scan,
}


@functools.cache
def want(distance):
    arrays, params = draw(distance)
    with jax.enable_x64(True):
        arrays = [
            jnp.asarray(a, None if a.dtype == bool else np.float64)
            for a in arrays
        ]
        params = jax.tree.map(lambda a: jnp.asarray(a, np.float64), params)
        out = jax.jit(functools.partial(all_kinds, plain_norm))(params, *arrays)
        return jax.tree.map(np.asarray, out)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_derivative_in_every_context(context, distance):
    arrays, params = draw(distance)
    got = CONTEXTS[context](params, arrays)
    for kind, true in want(distance).items():
        scale = np.abs(true).max()
        error = np.abs(np.asarray(got[kind], np.float64) - true).max()
        # A second derivative divides by the standard deviation once more.
        tolerance = 1e-5 if kind in ("value", "grad", "jvp") else 5e-5
        assert error <= tolerance * scale, (kind, error / scale)


def test_flax_fails_where_this_runs():
    """Why an unbound axis means global here: the same model everywhere."""
    (x, *_), _ = draw(0.5)
    flax = nn.BatchNorm(axis_name="data", use_running_average=False)
    variables = flax.init(jax.random.key(0), x)
    with pytest.raises(NameError, match="unbound axis name"):
        flax.apply(variables, x, mutable=["batch_stats"])
    MODULE.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("axis_name", (None, "data"))
@pytest.mark.parametrize(
    "options",
    (
        {},
        dict(where=np.arange(4)[:, None] < 3),
        dict(ids=np.arange(4) % 2, sharing=jaxbn.Scope(num_ids=2)),
        dict(sharing=jaxbn.Scope(normalize_over=2)),
    ),
    ids=("plain", "mask", "ids", "ghost"),
)
def test_vmap_inside_of_shard_map(axis_name, options):
    """Both passes run, as a select, whose types JAX checks."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(0).normal(30, 1, (3, 16, 5)).astype(np.float32)

    def norm(x):
        y, _ = jaxbn.batch_norm(x, axis_name=axis_name, **options)
        return y

    def run(check_vma):
        sharded = jax.shard_map(
            jax.vmap(norm),
            mesh=mesh,
            in_specs=P(None, "data"),
            out_specs=P(None, "data"),
            check_vma=check_vma,
        )
        grad = jax.grad(lambda x: jnp.sin(3 * sharded(x)).sum())
        return jax.jit(lambda x: (sharded(x), grad(x)))(x)

    y, dx = run(True)
    chex.assert_trees_all_close((y, dx), run(False), rtol=1e-4, atol=1e-4)
    if axis_name is None:
        want = jax.vmap(jax.vmap(norm))(x.reshape(3, 4, 4, 5))
        chex.assert_trees_all_close(y, want.reshape(x.shape), atol=1e-4)
