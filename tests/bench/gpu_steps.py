"""Whole training steps on an accelerator: speed, memory, largest batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from tests.bench import gpu_nets, gpu_trace, torch_peer
from tests.bench.gpu_nets import GIB, VARIANTS, Run, Steps, short


def speed(run: Run) -> Iterator[dict]:
    """Images a second and memory of a step, with one norm or another."""
    for network in run.networks:
        calls: dict[str, Any] = {}
        for name, fields in VARIANTS.items():
            if "policy" in fields and not network.bottleneck:
                continue
            if run.quick and name == "none":
                continue
            if run.over():
                yield {"note": f"no time left to compile {name}"}
                continue
            start = time.perf_counter()
            try:
                steps = gpu_nets.steps(network, name)
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
                "compile s": time.perf_counter() - start,
            }
        for name, compiled in (("torch", False), ("torch compiled", True)):
            if torch_peer.device() is None or run.over():
                break
            if run.quick and compiled:
                break
            try:
                calls[name] = torch_peer.Steps(network, compiled=compiled)
                jax.block_until_ready(calls[name]())
            except Exception as error:
                calls.pop(name, None)
                yield {"note": f"{network.name}, {name}: {short(error)}"}
        if not calls:
            continue
        seconds = run.time(calls, rounds=8)
        for name, t in seconds.items():
            row = {
                "network": network.name,
                "batch": network.images[0],
                "norm": name,
                "ms": 1e3 * float(np.median(t)),
                "images/s": network.images[0] / float(np.median(t)),
            }
            if "flax" in seconds:
                ratio = np.median(seconds["flax"] / t)
                row["speed over flax"] = float(ratio)
            yield row


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
                    steps = gpu_nets.steps(network, name)
                else:
                    steps = Steps(network, batch=size, **VARIANTS[name])
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
        steps = gpu_nets.steps(network, name)
        where = None if run.trace is None else f"{run.trace}/{name}"
        shares = gpu_trace.shares(steps, steps.compiled.as_text(), where)
        yield {"network": network.name, "norm": name} | {
            kind: f"{ms:.3g} ms {part:.0%}"
            for kind, (ms, part) in shares.items()
        }
