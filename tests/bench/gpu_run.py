"""What every section of the benchmark for accelerators is given."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tests.bench import measure
from tests.bench.gpu_nets import LARGE, QUICK


class Run:
    """What every section is given: the sizes, the clock and a deadline."""

    def __init__(
        self, *, quick: bool, seconds: float, trace: str | None = None
    ):
        self.quick = quick
        self.on_cpu = jax.default_backend() == "cpu"
        self.networks = QUICK if quick else LARGE
        self.trace = trace
        self.deadline = time.perf_counter() + seconds

    def over(self) -> bool:
        """Whether the section's time is spent."""
        return time.perf_counter() > self.deadline

    def time(
        self, calls: dict[str, Callable[[], Any]], rounds: int = 10
    ) -> dict[str, np.ndarray]:
        """Seconds a call, (rounds,), interleaved, several queued at a time."""
        if self.quick:
            return measure.interleaved(calls, rounds=2)
        slowest = 0.0
        for call in calls.values():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            slowest = max(slowest, time.perf_counter() - start)
        repeat = int(min(max(0.05 / slowest, 1), 50))
        return measure.interleaved(calls, rounds=rounds, repeat=repeat)


def together(builders: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls all at once, in threads; an exception is returned in its place.

    XLA compiles outside of Python's lock, and tries kernels out on the device
    one program at a time.
    """

    def call(build: Callable[[], Any]) -> Any:
        try:
            return build()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        return list(pool.map(call, builders))


def short(error: Exception) -> str:
    """Returns an error in a few words."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[
        :100
    ]
