"""One step with shared statistics, under shard_map, vmap and jit."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Scope

DEVICES, LOCAL, CHANNELS = 8, 4, 3
N = DEVICES * LOCAL
NUM_IDS = 3

# What shares statistics, as a label of each of the 32 examples in a row.
PARTITIONS = {
    "everything": (Scope(), np.zeros(N, int)),
    "group_size=2": (Scope(group_size=2), np.arange(N) // 8),
    "group_size=8": (Scope(group_size=8), np.zeros(N, int)),
    "axis_index_groups": (
        Scope(axis_index_groups=[[0, 7], [1, 6], [2, 5], [3, 4]]),
        np.minimum(np.arange(N) // 4, 7 - np.arange(N) // 4),
    ),
    "normalize_over=2": (Scope(normalize_over=2), np.arange(N) // 2),
    "normalize_over=4": (Scope(normalize_over=4), np.arange(N) // 4),
    "normalize_over=16": (Scope(normalize_over=16), np.arange(N) // 16),
}


def problem(masked, with_ids):
    rng = np.random.default_rng(0)
    # Where nothing is masked, so far from 0 that every sum is taken again.
    mean = 5 if masked else 100
    x = rng.normal(mean, 2, (N, 2, CHANNELS)).astype(np.float32)
    keep = np.ones((N, 2, 1), bool)
    if masked:
        keep = rng.random((N, 2, 1)) < 0.7
        keep[8:12] = False  # a device that has nothing
        x = np.where(keep | (np.arange(N) % 2 == 0)[:, None, None], x, np.nan)
    scale, bias = rng.normal(1, 0.5, (2, NUM_IDS, CHANNELS)).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    ids = rng.integers(0, NUM_IDS, N).astype(np.int32)
    if not with_ids:
        scale, bias, ids = scale[0], bias[0], None
    return x, scale, bias, keep, cotangent, ids


def step(scope, x, scale, bias, keep, cotangent, ids, norm=jaxbn.batch_norm):
    def loss(x, scale, bias):
        y, batch = norm(
            x, scale, bias, ids=ids, where=keep, axis_name="data", sharing=scope
        )
        return (y * cotangent).sum(), (y, batch)

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return out, grads


def in_shard_map(scope, arguments, *, check_vma=True, step=step):
    with_ids = arguments[-1] is not None
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def run(*arguments):
        out, (dx, *affine) = step(scope, *arguments)
        if not check_vma:
            affine = jax.lax.psum(affine, "data")
        return out, (dx, *affine)

    parts, whole = P("data"), P()
    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(
                *(parts, whole, whole, parts, parts),
                parts if with_ids else None,
            ),
            out_specs=((parts, whole), (parts, whole, whole)),
            check_vma=check_vma,
        )
    )(*arguments)


def in_vmap(scope, arguments, *, step=step):
    def split(a):
        return a if a is None else a.reshape(DEVICES, LOCAL, *a.shape[1:])

    x, scale, bias, *rest = arguments
    run = jax.vmap(
        functools.partial(step, scope),
        (0, None, None, 0, 0, None if arguments[-1] is None else 0),
        ((0, None), (0, 0, 0)),
        axis_name="data",
    )
    (y, batch), (dx, dscale, dbias) = jax.jit(run)(
        split(x), scale, bias, *map(split, rest)
    )
    y, dx = y.reshape(x.shape), dx.reshape(x.shape)
    return (y, batch), (dx, dscale.sum(0), dbias.sum(0))


def on_global_arrays(scope, arguments, *, kind=AxisType.Auto, step=step):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        x, scale, bias, *rest = arguments
        x, *rest = jax.device_put((x, *rest), sharding)
        return jax.jit(functools.partial(step, scope))(x, scale, bias, *rest)
