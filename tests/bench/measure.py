"""Times, bytes and saved arrays of a layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.bench.layers import Layer

# What forward and backward cannot do without, in passes over x: statistics
# read x; y reads x and is written; the two sums of the backward pass read x
# and the cotangent; dx reads both and is written.
FLOOR = {"forward": 3, "forward+backward": 8}


def forward(layer: Layer) -> Callable[..., Any]:
    """Returns (params, state, x, ct) -> (y, state); ct is not read."""

    def run(params, state, x, ct):
        return layer.train(params, state, x)

    return run


def forward_backward(layer: Layer) -> Callable[..., Any]:
    """Returns (params, state, x, ct) -> (y, state, dparams, dx)."""

    def run(params, state, x, ct):
        def train(params, x):
            return layer.train(params, state, x)

        y, vjp, state = jax.vjp(train, params, x, has_aux=True)
        return y, state, *vjp(ct)

    return run


MODES = {"forward": forward, "forward+backward": forward_backward}


def inputs(
    shape: tuple[int, ...], dtype: str, *, channels_first: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns x from N(1, 2) and a cotangent from N(0, 1), both (N, H, W, C).

    With channels_first they are laid out as (N, C, H, W).
    """
    keys = jax.random.split(jax.random.key(0))
    x, ct = (jax.random.normal(key, shape) for key in keys)
    x = 1 + 2 * x
    if channels_first:
        x, ct = jnp.moveaxis(x, -1, 1), jnp.moveaxis(ct, -1, 1)
    return jax.block_until_ready((x.astype(dtype), ct.astype(dtype)))


def interleaved(
    calls: dict[str, Callable[[], Any]], *, rounds: int, repeat: int = 1
) -> dict[str, np.ndarray]:
    """Times every call once a round: A B C, C A B, ...

    A neighbour on the machine then slows all of them, and ratios within a
    round keep their meaning where times do not. The order is drawn anew each
    round: what ran before decides what the cache holds.

    Args:
      calls: functions that start work and return its arrays.
      rounds: number of times each is measured.
      repeat: calls queued before one wait, so that on an accelerator the
        time to start a program hides behind the program before it.

    Returns:
      Seconds a call, (rounds,), by name.
    """
    seconds = {name: np.empty(rounds) for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    rng = np.random.default_rng(0)
    for i in range(rounds):
        for name in rng.permutation(list(calls)):
            call = calls[name]
            start = time.perf_counter()
            for _ in range(repeat):
                out = call()
            jax.block_until_ready(out)
            seconds[name][i] = (time.perf_counter() - start) / repeat
            del out
    return seconds


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: np.ndarray) -> Spread:
    """Returns the median and the quartiles of all values."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def cost(compiled: jax.stages.Compiled) -> float | None:
    """Returns the bytes that XLA counts as read or written, if it does."""
    analysis = compiled.cost_analysis() or {}
    if isinstance(analysis, list):
        analysis = analysis[0]
    return analysis.get("bytes accessed")


def residuals(layer: Layer, x: jax.Array) -> dict[str, float]:
    """Returns the bytes that jax.vjp keeps for backward, in units of x.

    By dtype; the same buffer counts once, and what is no larger than one
    value a feature is left out.
    """
    params, state = layer.init()

    def train(params, x):
        return layer.train(params, state, x)

    _, vjp, _ = jax.vjp(train, params, x, has_aux=True)
    kept = {}
    for leaf in jax.tree.leaves(vjp):
        if isinstance(leaf, jax.Array) and leaf.size > x.size // 2:
            kept[leaf.unsafe_buffer_pointer()] = leaf
    total: dict[str, float] = {}
    for leaf in kept.values():
        name = jnp.dtype(leaf.dtype).name
        total[name] = total.get(name, 0) + leaf.nbytes / x.nbytes
    return total


def stack_temp_bytes(layer: Layer, shape: tuple[int, ...], dtype: str) -> int:
    """Returns XLA's temporary bytes for the gradient of six conv-norm-relu.

    All in one jit, where XLA may recompute what jax.vjp would have saved.

    Args:
      layer: the norm.
      shape: (N, H, W, C) of every activation.
      dtype: of activations and kernels.
    """
    channels = shape[-1]
    form = ("NHWC", "HWIO", "NHWC")
    if layer.channels_first:
        form = ("NCHW", "HWIO", "NCHW")
        shape = (shape[0], channels, *shape[1:-1])

    def loss(weights, states, x):
        for (kernel, params), state in zip(weights, states):
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=form
            )
            x, _ = layer.train(params, state, x)
            x = jax.nn.relu(x)
        return jnp.square(x.astype(jnp.float32)).mean()

    params, state = layer.init()
    kernel = jnp.zeros((3, 3, channels, channels), dtype)
    abstract = jax.eval_shape(
        lambda *a: a,
        [(kernel, params)] * 6,
        [state] * 6,
        jax.ShapeDtypeStruct(shape, dtype),
    )
    compiled = jax.jit(jax.grad(loss)).lower(*abstract).compile()
    return compiled.memory_analysis().temp_size_in_bytes
