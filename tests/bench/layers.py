"""Batch norm of jaxbn and of its peers behind one interface."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp

import jaxbn.linen

Tree = Any


class Layer(NamedTuple):
    """One library's layer as pure functions; no array is closed over.

    init: () -> (params, state).
    train: (params, state, x, mask=None) -> (y, state).
    evaluate: (params, state, x) -> y.
    running: state -> (mean, var), (C,), as inference reads them.
    masks: whether train takes a mask.
    channels_first: x is (N, C, ...) and not (N, ..., C).
    check_vma: whether train runs in a shard_map that checks replication.
    """

    init: Callable[[], tuple[Tree, Tree]]
    train: Callable[..., tuple[jax.Array, Tree]]
    evaluate: Callable[[Tree, Tree, jax.Array], jax.Array]
    running: Callable[[Tree], tuple[jax.Array, jax.Array]]
    masks: bool = False
    channels_first: bool = False
    check_vma: bool = True


def _linen(module, channels, dtype, **fields) -> Layer:
    layer = module(dtype=dtype, **fields)

    def init():
        x = jnp.zeros((2, channels), dtype)
        variables = layer.init(jax.random.key(0), x, use_running_average=False)
        return variables["params"], variables["batch_stats"]

    def apply(params, state, x, **options):
        variables = {"params": params, "batch_stats": state}
        return layer.apply(variables, x, **options)

    def train(params, state, x, mask=None):
        y, new = apply(
            params,
            state,
            x,
            mask=mask,
            use_running_average=False,
            mutable=["batch_stats"],
        )
        return y, new["batch_stats"]

    def evaluate(params, state, x):
        return apply(params, state, x, use_running_average=True)

    def running(state):
        return state["mean"], state["var"]

    return Layer(init, train, evaluate, running, masks=True)


def _jaxbn(channels, dtype, **fields) -> Layer:
    return _linen(jaxbn.linen.BatchNorm, channels, dtype, **fields)


def _flax_fast(channels, dtype, **fields) -> Layer:
    return _linen(flax.linen.BatchNorm, channels, dtype, **fields)


def _flax_stable(channels, dtype, **fields) -> Layer:
    fields["use_fast_variance"] = False
    return _linen(flax.linen.BatchNorm, channels, dtype, **fields)


def _nnx(channels, dtype, **fields) -> Layer:
    from flax import nnx

    def split():
        module = nnx.BatchNorm(
            channels, dtype=dtype, rngs=nnx.Rngs(0), **fields
        )
        return nnx.split(module, nnx.Param, nnx.BatchStat)

    graph = split()[0]

    def init():
        return split()[1:]

    def train(params, state, x, mask=None):
        module = nnx.merge(graph, params, state, copy=True)
        y = module(x, use_running_average=False, mask=mask)
        return y, nnx.state(module, nnx.BatchStat)

    def evaluate(params, state, x):
        module = nnx.merge(graph, params, state)
        return module(x, use_running_average=True)

    def running(state):
        return state["mean"][...], state["var"][...]

    return Layer(init, train, evaluate, running, masks=True)


def _haiku(channels, dtype, *, axis_name=None, momentum=0.99) -> Layer:
    import haiku as hk

    def layer(axis_name):
        def call(x, training):
            module = hk.BatchNorm(
                True, True, momentum, cross_replica_axis=axis_name
            )
            return module(x, training)

        return hk.transform_with_state(call)

    inside = layer(axis_name)

    def init():
        x = jnp.zeros((2, channels), dtype)
        params, state = layer(None).init(None, x, True)
        # A parameter is (1, C), and must grow axes with the input.
        return jax.tree.map(jnp.ravel, params), state

    def as_input(tree, x):
        def shape(a):
            return a.reshape((1,) * (x.ndim - 1) + (-1,)) if a.ndim else a

        return jax.tree.map(shape, tree)

    def train(params, state, x, mask=None):
        if mask is not None:
            raise ValueError("haiku.BatchNorm takes no mask.")
        params, state = as_input(params, x), as_input(state, x)
        return inside.apply(params, state, None, x, True)

    def evaluate(params, state, x):
        params, state = as_input(params, x), as_input(state, x)
        return inside.apply(params, state, None, x, False)[0]

    def running(state):
        parts = "mean_ema", "var_ema"
        mean, var = (state[f"batch_norm/~/{p}"]["average"] for p in parts)
        return mean.ravel(), var.ravel()

    return Layer(init, train, evaluate, running)


def _equinox(channels, dtype, *, axis_name=None, momentum=0.99) -> Layer:
    import equinox as eqx

    names = "example" if axis_name is None else ("example", axis_name)

    def make():
        module, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            channels, names, momentum=momentum, mode="batch", dtype=dtype
        )
        params, rest = eqx.partition(module, eqx.is_inexact_array)
        return params, rest, state

    rest = make()[1]

    def init():
        params, _, state = make()
        return params, state

    def apply(params, state, x, inference):
        def one(x, state):
            module = eqx.combine(params, rest)
            return module(x, state, inference=inference)

        return jax.vmap(one, (0, None), (0, None), axis_name="example")(
            x, state
        )

    def train(params, state, x, mask=None):
        if mask is not None:
            raise ValueError("equinox.nn.BatchNorm takes no mask.")
        return apply(params, state, x, False)

    def evaluate(params, state, x):
        return apply(params, state, x, True)[0]

    def running(state):
        mean, var = state.get(rest.batch_state_index)
        left = momentum ** state.get(rest.batch_counter)
        return mean / (1 - left), var / (1 - left)

    return Layer(
        init, train, evaluate, running, channels_first=True, check_vma=False
    )


class _Peer(NamedTuple):
    build: Callable[..., Layer]
    module: str
    package: str


PEERS = {
    "jaxbn": _Peer(_jaxbn, "jaxbn", "jaxbn"),
    "flax fast": _Peer(_flax_fast, "flax", "flax"),
    "flax stable": _Peer(_flax_stable, "flax", "flax"),
    "nnx": _Peer(_nnx, "flax.nnx", "flax"),
    "haiku": _Peer(_haiku, "haiku", "dm-haiku"),
    "equinox": _Peer(_equinox, "equinox", "equinox"),
}
BASE = "flax fast"


def installed() -> tuple[list[str], list[str]]:
    """Returns the peers that import here and those that do not."""
    here, missing = [], []
    for name, peer in PEERS.items():
        try:
            importlib.import_module(peer.module)
        except ImportError:
            missing.append(name)
        else:
            here.append(name)
    return here, missing


def versions() -> dict[str, str]:
    """Returns the versions of the packages that are measured."""
    found = {"jaxbn": jaxbn.__version__, "jax": jax.__version__}
    for package in ("jaxlib", "flax", "dm-haiku", "equinox"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def build(
    name: str,
    channels: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    axis_name: str | None = None,
    momentum: float = 0.99,
) -> Layer:
    """Returns one peer's layer; input, parameters' product and y in dtype.

    Statistics are what each library makes them: float32 in jaxbn and flax,
    dtype in haiku and equinox. equinox runs in mode "batch".

    Raises:
      ImportError: the peer is not installed.
    """
    return PEERS[name].build(
        channels, jnp.dtype(dtype), axis_name=axis_name, momentum=momentum
    )
