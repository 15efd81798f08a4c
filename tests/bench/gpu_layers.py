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

from tests.bench import layers, measure, torch_peer
from tests.bench.gpu_run import Run, short, together

# Passes over x that nothing can do without, forward and with backward. See
# measure.FLOOR; the ReLU's mask follows from x, and where something was added,
# from one bit a value, which counts as nothing. Then forward reads what is
# added, and backward writes its cotangent.
FLOORS = {
    "norm": (3, 8),
    "norm, relu": (3, 8),
    "norm, add, relu": (4, 10),
}
PEERS = ("jaxbn", "flax fast", "flax stable", "haiku", "equinox")
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


def copy_speed(run: Run) -> Iterator[dict]:
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


def alone(run: Run) -> Iterator[dict]:
    """The norm by itself, over the shapes of two networks."""
    for dtype in DTYPES[:1] if run.quick else DTYPES:
        for backward in (True, False):
            # In full for what training in mixed precision takes.
            most = 6 if backward and dtype == "bfloat16" else 3
            yield from _rows(run, "norm", dtype, backward, most)


def fused(run: Run) -> Iterator[dict]:
    """The norm with a ReLU, and with a sum and a ReLU, in one program."""
    for backward in (True, False):
        for variant in ("norm, relu", "norm, add, relu")[run.quick :]:
            yield from _rows(run, variant, "bfloat16", backward, 2)


class _Row(NamedTuple):
    """One shape, and what is computed of it."""

    network: str
    layers: int
    shape: tuple[int, ...]
    dtype: str
    variant: str
    backward: bool
    many: int  # layers in one program

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def _rows(
    run: Run, variant: str, dtype: str, backward: bool, most: int
) -> Iterator[dict]:
    """A row a shape, those first that a network spends most on."""
    rows = []
    for network in run.networks:
        found = norm_shapes(network.build("jaxbn"), network.images)
        for shape, times in sorted(
            found.items(), key=lambda item: -math.prod(item[0]) * item[1]
        )[: 1 if run.quick else most]:
            row = _Row(network.name, times, shape, dtype, variant, backward, 1)
            many = copies(row.nbytes, run.on_cpu)
            rows.append(row._replace(many=many))
    if run.over():
        yield {"note": f"no time left for {variant}, {dtype}"}
        return
    wanted = [(row, name) for row in rows for name in PEERS]
    programs = dict(
        zip(
            wanted, together([functools.partial(_compiled, *w) for w in wanted])
        )
    )
    for row in rows:
        if run.over():
            yield {"note": f"no time left for {row.network} {row.shape}"}
            return
        yield _measured(run, row, {n: programs[row, n] for n in PEERS})


def _compiled(row: _Row, name: str) -> Callable[..., Any]:
    """Returns data -> results, compiled."""
    layer = layers.build(name, row.shape[-1], dtype=row.dtype)
    params, state = layer.init()
    x = jax.ShapeDtypeStruct(row.shape, row.dtype)
    if layer.channels_first:
        x = jax.eval_shape(_channels_first, x)
    compiled = (
        jax.jit(program(layer, row.variant, row.backward))
        .lower(params, state, [(x, x, x)] * row.many)
        .compile()
    )

    def call(data: list[tuple[jax.Array, ...]]) -> Any:
        if layer.channels_first:
            data = jax.tree.map(_channels_first, data)
        return functools.partial(compiled, params, state, data)

    return call


@jax.jit
def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def _measured(run: Run, row: _Row, programs: dict[str, Any]) -> dict:
    words = [jnp.zeros(row.nbytes // 4, jnp.uint32) for _ in range(row.many)]
    copy = jax.jit(lambda words: [w + 1 for w in words])
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: copy(words)}
    what = "forward+backward" if row.backward else "forward"
    shown: dict = {
        "network": row.network,
        "layers": row.layers,
        "x": "x".join(map(str, row.shape)),
        "dtype": row.dtype,
        "what": f"{row.variant}, {what}",
    }
    x, ct = measure.inputs(row.shape, row.dtype, channels_first=False)
    # Each of its own, or the compiler would compute once for all. All means
    # are near enough to 0 for one pass.
    data = [(x + i / 8, jnp.flip(ct), ct) for i in range(row.many)]
    failed = {}
    for name, compiled in programs.items():
        try:
            if isinstance(compiled, Exception):
                raise compiled
            call = compiled(data)
            # Here, so that a program that does not fit is missed by itself.
            jax.block_until_ready(call())
            calls[name] = call
        except Exception as error:
            failed[name] = short(error)
    if torch_peer.device() is not None:
        try:
            calls["torch"] = torch_peer.layer(
                row.shape, row.dtype, row.variant, row.backward, row.many
            )
        except Exception as error:
            failed["torch"] = short(error)
    seconds = run.time(calls, rounds=6)
    passes = FLOORS[row.variant][row.backward]
    copied = 2 * row.nbytes * row.many / np.median(seconds["copy"]) / 1e9
    shown["copy GB/s"] = copied
    for name in (*PEERS, "torch"):
        if name in seconds:
            shown[name] = Time(
                1e3 * float(np.median(seconds[name])) / row.many,
                share(passes, seconds["copy"], seconds[name]),
            )
        else:
            shown[name] = failed.get(name, "-")
    return shown
