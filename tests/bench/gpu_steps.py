"""Whole training steps on an accelerator: speed, memory, largest batch."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tests.bench import gpu_trace, torch_peer
from tests.bench.gpu_nets import QUICK, SMALL, Network
from tests.bench.gpu_run import Run, short
from tests.bench.gpu_step import GIB, VARIANTS, Steps, compile_all

LOOP = 50  # steps of a program


def speed(run: Run) -> Iterator[dict]:
    """Images a second and memory of a step, with one norm or another."""
    if run.over():
        yield {"note": "no time left to compile"}
        return
    start = time.perf_counter()
    names = [n for n in VARIANTS if not (run.quick and n == "none")]
    compiled = compile_all(run.networks, names)
    yield {"note": f"compiled in {time.perf_counter() - start:.0f} s"}
    for network in run.networks:
        calls: dict[str, Any] = {}
        for name in names:
            steps = compiled.get((network, name))
            if steps is None:
                continue
            try:
                if isinstance(steps, Exception):
                    raise steps
                jax.block_until_ready(steps())
            except Exception as error:
                yield {"note": f"{network.name}, {name}: {short(error)}"}
                continue
            calls[name] = steps
            yield {
                "network": network.name,
                "batch": steps.size,
                "norm": name,
                "temporary GiB": steps.temp / GIB,
                "all GiB": steps.total / GIB,
            }
        yield from _timed(run, network, calls)
        for name in ("torch", "torch compiled")[: 1 if run.quick else 2]:
            if torch_peer.device() is None or run.over():
                yield {"note": f"{name} is left out"}
                continue
            try:
                steps = torch_peer.Steps(network, compiled="compiled" in name)
                jax.block_until_ready(steps())
                beside = {name: steps}
                if "flax" in calls:
                    beside["flax"] = calls["flax"]
                rows = list(_timed(run, network, beside))
                yield from (row for row in rows if row["norm"] == name)
            except Exception as error:
                yield {"note": f"{network.name}, {name}: {short(error)}"}
            torch_peer.free()


def _timed(
    run: Run, network: Network, calls: dict[str, Any], times: int = 1
) -> Iterator[dict]:
    """A row for each call of so many steps; all in turns."""
    if not calls:
        return
    seconds = run.time(calls, rounds=6)
    for name, t in seconds.items():
        row = {
            "network": network.name,
            "batch": network.images[0],
            "norm": name,
            "ms": 1e3 * float(np.median(t)) / times,
            "images/s": times * network.images[0] / float(np.median(t)),
        }
        if "flax" in seconds:
            row["speed over flax"] = float(np.median(seconds["flax"] / t))
        yield row


def loop(run: Run) -> Iterator[dict]:
    """Steps of a small network in one program, where kernel launches count."""
    network = QUICK[0] if run.quick else SMALL
    times = 2 if run.quick else LOOP
    names = ["jaxbn", "flax", "none", "jaxbn, conditional", "jaxbn, one pass"]
    for dtype in ("bfloat16", "float32")[: 1 if run.quick else 2]:
        if run.over():
            yield {"note": f"no time left for {dtype}"}
            return
        compiled = compile_all([network], names, loop=times, dtype=dtype)
        calls = {}
        for (_, name), steps in compiled.items():
            try:
                if isinstance(steps, Exception):
                    raise steps
                jax.block_until_ready(steps())
                calls[name] = steps
            except Exception as error:
                yield {"note": f"{network.name}, {name}: {short(error)}"}
        for row in _timed(run, network, calls, times):
            yield row | {"dtype": dtype}


def largest_batch(run: Run) -> Iterator[dict]:
    """Doubles the batch until the step does not fit, by analysis or in fact."""
    network = run.networks[0]
    torch_peer.free()
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    names = ("jaxbn", "jaxbn, recomputed", "flax")
    for name in names[:1] if run.quick else names:
        size, fits = network.images[0], 0
        while not run.over():
            row = {"norm": name, "batch": size}
            try:
                if size == network.images[0]:
                    steps = compile_all([network], [name])[network, name]
                else:
                    steps = Steps(network, batch=size, **VARIANTS[name])
                    steps.compile()
                row |= {"all GiB": steps.total / GIB}
                if limit is not None and steps.total > limit:
                    yield row | {"outcome": f"over {limit / GIB:.1f} GiB"}
                    break
                jax.block_until_ready(steps())
            except Exception as error:
                yield row | {"outcome": short(error)}
                break
            finally:
                steps = None  # its arrays are in the way of the next
            yield row | {"outcome": "ran"}
            fits, size = size, 2 * size
            if run.quick and size > 2 * network.images[0]:
                break
        left = " so far; no time left" if run.over() else ""
        yield {"note": f"{network.name}, {name}: batch {fits} ran{left}"}


def kernels(run: Run) -> Iterator[dict]:
    """Share of a step's device time by kind of kernel, from a trace."""
    network = run.networks[0]
    for name in ("jaxbn", "flax"):
        if run.over():
            yield {"note": f"no time left to trace {name}"}
            return
        steps = compile_all([network], [name])[network, name]
        where = None if run.trace is None else f"{run.trace}/{name}"
        text = steps.compiled.as_text()
        shares = gpu_trace.shares(steps, text, where)
        if where is not None:
            pathlib.Path(where, "program.txt").write_text(text)
        yield {"network": network.name, "norm": name} | {
            kind: f"{ms:.3g} ms {part:.0%}"
            for kind, (ms, part) in shares.items()
        }
