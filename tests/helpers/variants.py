"""Both layers with one signature, batches for them, and every context."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx

STEPS, N, C = 3, 16, 3
EPSILON = 1e-5


class Linen:
    """A layer as a pure function of its state, a dict of arrays."""

    def __init__(self, **options):
        self.layer = jaxbn.linen.BatchNorm(**options)

    def init(self, x, **call):
        init = functools.partial(self.layer.init, use_running_average=False)
        variables = jax.jit(init)(jax.random.key(0), x, **call)
        return {**variables["params"], **variables["batch_stats"]}

    def __call__(self, state, x, *, train=True, **call):
        params = {k: v for k, v in state.items() if k in ("scale", "bias")}
        stats = {k: v for k, v in state.items() if k not in params}
        y, updates = self.layer.apply(
            {"params": params, "batch_stats": stats},
            x,
            not train,
            mutable=["batch_stats"] if train else [],
            **call,
        )
        return y, {**params, **updates.get("batch_stats", stats)}


class Nnx:
    def __init__(self, **options):
        layer = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0), **options)
        self.graph, self.start = nnx.split(layer)

    def init(self, x, **call):
        return nnx.to_pure_dict(self.start)

    def __call__(self, state, x, *, train=True, **call):
        whole = jax.tree.map(lambda a: a, self.start)
        nnx.replace_by_pure_dict(whole, state)
        layer = nnx.merge(self.graph, whole)
        y = layer(x, use_running_average=not train, **call)
        return y, nnx.to_pure_dict(nnx.state(layer))


KINDS = pytest.mark.parametrize("kind", (Linen, Nnx))


def batches():
    """Batches, and masks by which devices keep unequally many, one nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (STEPS, N, 4, C)).astype(np.float32)
    keep = rng.random((STEPS, N, 4, 1)) < 0.6
    keep[:, 4:6] = False
    return x, keep


def assert_running(state, want, rtol=1e-5):
    np.testing.assert_allclose(state["mean"], want[0], rtol=rtol)
    np.testing.assert_allclose(state["var"], want[1], rtol=rtol)


def in_shard_map(step, *, check_vma=True):
    def mapped(state, x, keep):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )(state, x, keep)

    return jax.jit(mapped)


def in_vmap(step):
    def mapped(state, x, keep):
        x, keep = (a.reshape(8, -1, *a.shape[1:]) for a in (x, keep))
        y, state = jax.vmap(step, (None, 0, 0), (0, None), axis_name="data")(
            state, x, keep
        )
        return y.reshape(-1, *y.shape[2:]), state

    return jax.jit(mapped)


def in_pmap(step):
    mapped = jax.pmap(step, "data", in_axes=(None, 0, 0), out_axes=(0, None))

    def joined(state, x, keep):
        split = [a.reshape(8, -1, *a.shape[1:]) for a in (x, keep)]
        y, state = mapped(state, *split)
        return y.reshape(-1, *y.shape[2:]), state

    return joined


def on_global_arrays(step, *, kind=AxisType.Auto):
    def placed(state, x, keep):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, P("data"))
            return jax.jit(step)(state, *jax.device_put((x, keep), sharding))

    return placed


CONTEXTS = {
    "jit": jax.jit,
    "shard_map": in_shard_map,
    "check_vma=False": functools.partial(in_shard_map, check_vma=False),
    "vmap": in_vmap,
    "pmap": in_pmap,
    "Auto": on_global_arrays,
    "Explicit": functools.partial(on_global_arrays, kind=AxisType.Explicit),
}
