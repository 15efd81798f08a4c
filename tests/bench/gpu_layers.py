"""A layer on an accelerator, by itself and with what XLA fuses into it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.bench import gpu_nets, layers, measure, torch_peer

# Passes over x that nothing can do without, forward and with backward. See
# measure.FLOOR; the ReLU's mask follows from x, and where something was added,
# from one bit a value, which counts as nothing. Then forward reads what is
# added, and backward writes its cotangent.
FLOORS = {
    "norm": (3, 8),
    "norm, relu": (3, 8),
    "norm, add, relu": (4, 10),
}
PEERS = ("jaxbn", "flax fast", "flax stable", "haiku")
DTYPES = ("bfloat16", "float32")


class Time(NamedTuple):
    """Milliseconds of one call, and how close that is to the floor."""

    ms: float
    share: float  # time of so many passes at the speed of a copy, over ms

    def __str__(self) -> str:
        return f"{self.ms:.3g} ms {self.share:.0%}"


def share(passes: int, copy: np.ndarray, seconds: np.ndarray) -> float:
    """Returns the median share of the floor: a copy is two passes."""
    return float(np.median(copy * passes / 2 / seconds))


def copies(nbytes: int, on_cpu: bool) -> int:
    """Returns how many layers, each with its own x, one program holds.

    A program takes some microseconds to start, and one x alone stays in the
    cache. With enough of them neither is what the clock sees.
    """
    return 1 if on_cpu else min(max(math.ceil(2**28 / nbytes), 1), 8)


def norm_shapes(net: nn.Module, images: tuple[int, ...]) -> Counter:
    """Returns the shapes that a network normalizes, and how often each."""
    seen: Counter = Counter()

    class Spy(nn.Module):
        use_running_average: bool
        dtype: Any = None
        scale_init: Any = None

        def __call__(self, x: jax.Array) -> jax.Array:
            seen[x.shape] += 1
            return x

    jax.eval_shape(
        lambda x: net.clone(norm=Spy).init(jax.random.key(0), x, train=True),
        jax.ShapeDtypeStruct(images, jnp.float32),
    )
    return seen


def program(
    layer: layers.Layer, variant: str, backward: bool
) -> Callable[..., Any]:
    """Returns (params, state, [(x, added, ct), ...]) -> results, a list."""

    def train(params, x, added, state):
        y, state = layer.train(params, state, x)
        if "add" in variant:
            y = y + added
        return (jax.nn.relu(y) if "relu" in variant else y), state

    def one(params, state, x, added, ct):
        if not backward:
            return train(params, x, added, state)
        added = added if "add" in variant else None
        y, pull, state = jax.vjp(
            lambda *a: train(*a, state), params, x, added, has_aux=True
        )
        return y, state, *pull(ct)

    def run(params, state, data):
        return [one(params, state, *arrays) for arrays in data]

    return run


def copy_speed(run: gpu_nets.Run) -> Iterator[dict]:
    """Bandwidth of reading and writing once, and the time to start."""
    sizes = (1, 4) if run.quick else (1, 16, 256, 1024, 4096)
    nothing = jnp.zeros(8, jnp.uint32)
    add = jax.jit(lambda words: words + 1)
    for mib in sizes:
        words = jnp.zeros(mib * 2**18, jnp.uint32)
        calls = {"copy": functools.partial(add, words)}
        calls["start"] = functools.partial(add, nothing)
        seconds = run.time(calls)
        yield {
            "MiB": mib,
            "copy GB/s": 2 * words.nbytes / np.median(seconds["copy"]) / 1e9,
            "shortest program, us": 1e6 * np.median(seconds["start"]),
        }


def alone(run: gpu_nets.Run) -> Iterator[dict]:
    """The norm by itself, over the shapes of two networks."""
    for dtype in DTYPES[:1] if run.quick else DTYPES:
        for backward in (True, False):
            if not run.over():
                yield from _rows(run, "norm", dtype, backward)


def fused(run: gpu_nets.Run) -> Iterator[dict]:
    """The norm with a ReLU, and with a sum and a ReLU, in one program."""
    for backward in (True, False):
        for variant in ("norm, relu", "norm, add, relu")[run.quick :]:
            if not run.over():
                yield from _rows(run, variant, "bfloat16", backward)


def _rows(
    run: gpu_nets.Run, variant: str, dtype: str, backward: bool
) -> Iterator[dict]:
    """A row a shape, those first that a network spends most on."""
    for network in run.networks:
        found = norm_shapes(network.build("jaxbn"), network.images)
        total: Counter = Counter()
        most = 1 if run.quick else None
        for shape, times in sorted(
            found.items(), key=lambda item: -math.prod(item[0]) * item[1]
        )[:most]:
            if run.over():
                yield {"note": f"no time left for {network.name} {shape}"}
                return
            row = _row(run, shape, dtype, variant, backward)
            for name, time in row.items():
                if isinstance(time, Time):
                    total[name] += times * time.ms
            yield {"network": network.name, "layers": times} | row
        if most is None:
            sums = ", ".join(
                f"{name} {ms:.3g} ms" for name, ms in total.items()
            )
            yield {
                "note": f"all {found.total()} layers of {network.name}, "
                f"{row['what']}, {dtype}: {sums}"
            }


def _row(
    run: gpu_nets.Run,
    shape: tuple[int, ...],
    dtype: str,
    variant: str,
    backward: bool,
) -> dict:
    nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    many = copies(nbytes, run.on_cpu)
    words = [jnp.zeros(nbytes // 4, jnp.uint32) for _ in range(many)]
    copy = jax.jit(lambda words: [w + 1 for w in words])
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: copy(words)}
    row: dict = {
        "x": "x".join(map(str, shape)),
        "dtype": dtype,
        "what": f"{variant}, {'forward+backward' if backward else 'forward'}",
    }
    x, ct = measure.inputs(shape, dtype, channels_first=False)
    # Each of its own, or the compiler would compute once for all.
    data = [(x + i, jnp.flip(ct), ct) for i in range(many)]
    for name in PEERS:
        try:
            calls[name] = _call(name, shape, dtype, variant, backward, data)
        except Exception as error:
            row[name] = gpu_nets.short(error)
    if torch_peer.device() is not None:
        try:
            calls["torch"] = torch_peer.layer(
                shape, dtype, variant, backward, many
            )
        except Exception as error:
            row["torch"] = gpu_nets.short(error)
    seconds = run.time(calls)
    passes = FLOORS[variant][backward]
    row["copy GB/s"] = 2 * nbytes * many / np.median(seconds["copy"]) / 1e9
    for name in (*PEERS, "torch"):
        if name in seconds:
            row[name] = Time(
                1e3 * float(np.median(seconds[name])) / many,
                share(passes, seconds["copy"], seconds[name]),
            )
    return row


def _call(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    variant: str,
    backward: bool,
    data: list[tuple[jax.Array, ...]],
) -> Callable[[], Any]:
    layer = layers.build(name, shape[-1], dtype=dtype)
    params, state = layer.init()
    jitted = jax.jit(program(layer, variant, backward))
    # Here, so that a program that does not fit is missed by itself.
    jax.block_until_ready(jitted(params, state, data))
    return lambda: jitted(params, state, data)
