"""The benchmarks; each returns plain numbers for tables and JSON."""

from __future__ import annotations

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from tests.bench import layers, measure, memory_policy, sharded
from tests.bench import training as steps
from train import norms, resnet

SHAPES = ((64, 32, 32, 64), (128, 8, 8, 256), (32, 56, 56, 64))
DTYPES = ("float32", "bfloat16")
OFFSETS = (1e2, 1e3, 1e4, 1e5)


def say(text: str) -> None:
    """Reports progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def on_cpu() -> bool:
    """Whether the measurements run on the host's cores."""
    return jax.default_backend() == "cpu"


def speed(names: list[str], quick: bool) -> list[dict]:
    """Times forward and forward+backward of every peer, interleaved.

    On an accelerator the batches are eight times as large, beyond its cache
    and the time to start a program.
    """
    grow, rounds, repeat = (1, 60, 1) if on_cpu() else (8, 40, 10)
    shapes = SHAPES[1:2] if quick else SHAPES
    rows = []
    for mode in measure.MODES:
        for n, *rest in shapes:
            for dtype in DTYPES:
                shape = (n * grow, *rest)
                say(f"speed: {mode} {shape} {dtype}")
                row = {"mode": mode, "shape": shape, "dtype": dtype}
                row |= _speed_of(
                    names, mode, shape, dtype, 3 if quick else rounds, repeat
                )
                rows.append(row)
    return rows


def _speed_of(names, mode, shape, dtype, rounds, repeat) -> dict:
    calls, passes, data = {}, {}, {}
    for name in names:
        layer = layers.build(name, shape[-1], dtype=dtype)
        first = layer.channels_first
        if first not in data:
            data[first] = measure.inputs(shape, dtype, channels_first=first)
        arguments = (*layer.init(), *data[first])
        lowered = jax.jit(measure.MODES[mode](layer)).lower(*arguments)
        compiled = lowered.compile()
        calls[name] = functools.partial(compiled, *arguments)
        moved = measure.cost(compiled)
        passes[name] = moved and moved / data[first][0].nbytes

    nbytes = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    words = jnp.zeros(nbytes // 4, jnp.uint32)
    calls["copy"] = functools.partial(jax.jit(lambda words: words + 1), words)
    seconds = measure.interleaved(calls, rounds=rounds, repeat=repeat)
    copy = seconds.pop("copy")
    floor = copy * measure.FLOOR[mode] / 2
    return {
        "copy GB/s": measure.spread(2 * nbytes / copy / 1e9),
        "ms": {n: measure.spread(1e3 * t) for n, t in seconds.items()},
        "ratio": {
            n: measure.spread(t / seconds[layers.BASE])
            for n, t in seconds.items()
        },
        "share of copy bandwidth": {
            n: measure.spread(floor / t) for n, t in seconds.items()
        },
        "passes": passes,
    }


def memory(names: list[str], quick: bool) -> dict:
    """Arrays saved for backward, and XLA's temporary memory, in inputs."""
    shape = (8, 16, 16, 16) if quick else (64, 32, 32, 16)
    result: dict = {"shape": shape, "saved": {}, "temp": {}}
    for name in names:
        for dtype in DTYPES:
            say(f"memory: {name} {dtype}")
            layer = layers.build(name, shape[-1], dtype=dtype)
            x, _ = measure.inputs(
                shape, dtype, channels_first=layer.channels_first
            )
            temp = measure.stack_temp_bytes(layer, shape, dtype)
            result["saved"].setdefault(name, {})[dtype] = measure.residuals(
                layer, x
            )
            result["temp"].setdefault(name, {})[dtype] = temp / x.nbytes
    return result


def policy(names: list[str], quick: bool) -> dict:
    """Memory and time of a ResNet that computes its norms again."""
    return memory_policy.run(quick, on_cpu(), say)


def training(names: list[str], quick: bool) -> dict:
    """Images a second of whole training steps, beside flax's norm."""
    return steps.run(quick, on_cpu(), say)


def compile_times(names: list[str], quick: bool) -> dict:
    """Seconds to trace, lower and compile one training step of a ResNet."""
    depth, rounds = (20, 1) if quick else (110, 3)
    norms = ("jaxbn", "flax")
    seconds = {norm: ([], []) for norm in norms}
    lines = {}
    jax.config.update("jax_enable_compilation_cache", False)
    for i in range(rounds):
        for norm in norms:
            say(f"compile: ResNet-{depth}, {norm}, {i + 1} of {rounds}")
            step, abstract = _resnet_step(depth, norm)
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(step).lower(*abstract)
            between = time.perf_counter()
            lowered.compile()
            end = time.perf_counter()
            seconds[norm][0].append(between - start)
            seconds[norm][1].append(end - between)
            lines[norm] = lowered.as_text().count("\n")
    return {
        "depth": depth,
        "rounds": rounds,
        "trace and lower": {
            n: measure.spread(s[0]) for n, s in seconds.items()
        },
        "compile": {n: measure.spread(s[1]) for n, s in seconds.items()},
        "lines of StableHLO": lines,
    }


def _resnet_step(depth: int, norm: str):
    norm = functools.partial(norms.NORMS[norm], momentum=0.9)
    model = resnet.ResNet(depth=depth, num_classes=10, norm=norm)

    def step(params, state, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": state}
            logits, new = model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            wanted = jax.nn.one_hot(labels, 10)
            return -(wanted * jax.nn.log_softmax(logits)).sum(-1).mean(), new

        return jax.value_and_grad(loss, has_aux=True)(params)

    images = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((128,), jnp.int32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    arguments = variables["params"], variables["batch_stats"], images, labels
    return step, arguments


def stability(names: list[str], quick: bool) -> dict:
    """Error of the variance of N(offset, 1), float32, against float64."""
    say("stability")
    one_device = {
        name: {f"{o:.0e}": variance_error(name, o) for o in OFFSETS}
        for name in names
    }
    return {"one": one_device, "eight": _eight(tuple(names), quick)["shifts"]}


def variance_error(
    name: str, offset: float, *, channels: int = 8
) -> dict[str, float]:
    """Returns the largest relative error over features, least variance, NaN.

    The variance is the one that normalizes, read from running statistics of
    momentum 0. nan is the share of the layer's outputs that are NaN.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(offset, 1, (16384, channels)).astype(np.float32)
    layer = layers.build(name, channels, momentum=0.0)
    y, state = jax.jit(layer.train)(*layer.init(), x)
    var = np.asarray(layer.running(state)[1], np.float64)
    true = x.astype(np.float64).var(0)
    return {
        "error": float(np.abs(var / true - 1).max()),
        "least": float(var.min()),
        "nan": float(np.isnan(y).mean()),
    }


def sync(names: list[str], quick: bool) -> dict:
    """Masks, empty devices, all-reduces and drift over eight devices."""
    return _eight(tuple(names), quick)


@functools.cache
def _eight(names: tuple[str, ...], quick: bool) -> dict:
    say("eight simulated devices")
    return sharded.run(list(names), clean_steps=20 if quick else 1000)


SECTIONS = {
    "speed": speed,
    "memory": memory,
    "policy": policy,
    "training": training,
    "compile": compile_times,
    "stability": stability,
    "sync": sync,
}
