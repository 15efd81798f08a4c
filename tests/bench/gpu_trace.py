"""What the kernels of a traced step compute.

A profile names the HLO instruction that a kernel was made of. The compiled
program tells which operations of the model are fused in it. A convolution
counts as one whatever is fused into it; of the other kernels those count as
normalization that hold any operation of a norm's module, with the ReLU or sum
that XLA has put into the same kernel.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax

NORM = re.compile(r"/(BatchNorm|Affine)_\d+/")
PRODUCT = re.compile(
    r" (convolution|dot)\(|custom_call_target=\"[^\"]*(conv|gemm|matmul|cublas)"
)
KINDS = "convolution, matmul", "normalization", "other"


def kinds(hlo: str) -> dict[str, str]:
    """Returns, for each instruction of a compiled program, one of KINDS."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in hlo.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if opened:
            body = bodies.setdefault(opened[1], [])
        elif line.startswith("  "):
            body.append(line)
    found = {}
    for lines in bodies.values():
        for line in lines:
            name = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
            if not name:
                continue
            inner = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
            text = "\n".join(
                [line, *(part for one in inner for part in bodies.get(one, []))]
            )
            if PRODUCT.search(text):
                found[name[1]] = KINDS[0]
            else:
                found[name[1]] = KINDS[1] if NORM.search(text) else KINDS[2]
    return found


def add_up(
    events: Iterable[tuple[str, float]], of: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Returns kind -> (sum of durations, its part of all).

    Args:
      events: (HLO instruction, duration) of each kernel.
      of: instruction -> kind, from `kinds`.

    Raises:
      ValueError: there is no event.
    """
    total: Counter = Counter(dict.fromkeys(KINDS, 0.0))
    for name, duration in events:
        total[of.get(name, KINDS[2])] += duration
    everything = total.total()
    if not everything:
        raise ValueError("The profile holds no kernel with an HLO instruction.")
    return {kind: (t, t / everything) for kind, t in total.items()}


def shares(
    step: Callable[[], Any], hlo: str, where: str | None, steps: int = 3
) -> dict[str, tuple[float, float]]:
    """Traces some steps; returns kind -> (ms a step, part of device time).

    Args:
      step: starts one step and returns its arrays.
      hlo: text of the compiled program.
      where: directory that keeps the profile, for xprof or TensorBoard; None
        keeps none.
      steps: how many to trace.
    """
    jax.block_until_ready(step())
    with contextlib.ExitStack() as stack:
        if where is None:
            where = stack.enter_context(tempfile.TemporaryDirectory())
        with jax.profiler.trace(where):
            for _ in range(steps):
                out = step()
            jax.block_until_ready(out)
        newest = max(
            pathlib.Path(where).glob("**/*.xplane.pb"),
            key=lambda file: file.stat().st_mtime,
        )
        events = list(_events(newest))
    return add_up([(n, t / 1e6 / steps) for n, t in events], kinds(hlo))


def _events(profile: pathlib.Path) -> Iterable[tuple[str, float]]:
    """Yields (HLO instruction, nanoseconds) of what ran on the first device."""
    planes = list(jax.profiler.ProfileData.from_file(str(profile)).planes)
    devices = [p for p in planes if p.name.startswith("/device:")]
    for plane in devices[:1] or planes:
        lines = list(plane.lines)
        # A GPU's kernels are on streams; other lines repeat them in groups.
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:
            for event in line.events:
                stats = {key: value for key, value in event.stats}
                if "hlo_op" in stats:
                    name = instruction(str(stats["hlo_op"]), event.name)
                    yield name, event.duration_ns


def instruction(hlo_op: str, kernel: str) -> str:
    """Returns the HLO instruction of a kernel, from what the profile says.

    Kernels of a CUDA graph are filed under the graph. They bear the name of
    their instruction, or of the first of those that share the kernel, with an
    underscore for the dot.
    """
    if not hlo_op.startswith("command_buffer"):
        return hlo_op
    return re.sub(r"_(\d+)$", r".\1", kernel)
