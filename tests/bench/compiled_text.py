"""What an optimized program does, read from its text.

The ordinary part of a program is what runs at every call: the entry, what it
calls, the bodies of loops whose trip count is known, that many times, and the
conditions of all loops, once. The rest, every branch of a conditional and the
bodies of other loops, is counted apart: there a program keeps what it seldom
needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxbn.testing import _collectives
from tests.bench.compiled_bytes import moved
from tests.bench.compiled_hlo import (
    Array,
    Instruction,
    Module,
    condition,
    fused,
    trip_count,
)

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

# These move no bytes.
_FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class Kernel(NamedTuple):
    """An instruction that the device runs as a whole.

    Attributes:
      instruction: as it stands in its computation.
      inside: opcodes of it and of everything fused into it.
      operands: arrays that it reads, in their full size.
      cycles: the compiler's estimate, where it gives one; else 0.
      bytes: read from main memory and written to it.
      collectives: kind -> count and bytes, itself or fused into it.
      times: that it runs in one call of the program.
      ordinary: whether it runs in every call.
    """

    instruction: Instruction
    inside: frozenset[str]
    operands: tuple[Array, ...]
    cycles: int
    bytes: int
    collectives: dict[str, _collectives.Traffic]
    times: int
    ordinary: bool


class Work(NamedTuple):
    """Sums over kernels."""

    cycles: int
    bytes: int
    kernels: int
    collectives: dict[str, int]  # kind -> count


def work(kernels: Iterable[Kernel], *, ordinary: bool) -> Work:
    """Returns sums over the ordinary part, or over what is apart from it."""
    cycles = moved = count = 0
    collectives: dict[str, int] = {}
    for each in kernels:
        if each.ordinary is not ordinary:
            continue
        cycles += each.times * each.cycles
        moved += each.times * each.bytes
        count += each.times
        for kind, traffic in each.collectives.items():
            more = each.times * traffic.count
            collectives[kind] = collectives.get(kind, 0) + more
    return Work(cycles, moved, count, collectives)


def traffic(kernels: Iterable[Kernel]) -> dict[str, dict[str, dict[int, int]]]:
    """Returns kind -> part -> bytes of a collective -> count.

    Of the ordinary part. The part is backward for what JAX's transposition
    made, the sums of gradients included; combined for what XLA put together
    from several and named after none; else forward.
    """
    found: dict[str, dict[str, dict[int, int]]] = {}
    for each in kernels:
        line, part = each.instruction.line, "combined"
        if "transpose(" in line:
            part = "backward"
        elif "op_name=" in line:
            part = "forward"
        for kind, (count, size) in each.collectives.items():
            if each.ordinary:
                sizes = found.setdefault(kind, {}).setdefault(part, {})
                sizes[size] = sizes.get(size, 0) + each.times * count
    return found


def sums_alone(kernels: Iterable[Kernel], rows: int = 1024) -> list[Kernel]:
    """Returns passes over an activation that only take sums per channel.

    What computes the activation, or reads it anyway, could take them along: a
    convolution sums its results as it writes them.

    Args:
      kernels: of a program.
      rows: that an activation has at least, as (rows, channels).

    Returns:
      Kernels of the ordinary part that reduce such an array to float32 vectors
      with no convolution among what is fused.
    """

    def alone(each: Kernel) -> bool:
        largest = max((a.size for a in each.operands), default=0)
        return (
            each.ordinary
            and "reduce" in each.inside
            and "convolution" not in each.inside
            and any(
                a.dtype == "f32"
                and 1 < a.size == max(a.shape)
                and a.size * rows <= largest
                for a in each.instruction.results
            )
        )

    return [each for each in kernels if alone(each)]


def read_kernels(module: Module) -> list[Kernel]:
    """Returns all kernels, of the ordinary part and apart from it."""
    return list(_walk(module, module.entry, 1, True))


def decisions(module: Module, computation: str | None = None) -> int:
    """Returns how often the ordinary part decides whether to run what is apart.

    Args:
      module: the program.
      computation: to begin with; the entry without it.
    """
    total = 0
    here = module.computations[computation or module.entry]
    for one in here.values():
        trips = None
        if one.opcode == "while":
            trips = trip_count(module, here, one)
        if one.opcode == "conditional" or (
            one.opcode == "while" and trips is None
        ):
            total += 1
        elif one.opcode in ("while", "call", "async-start"):
            each = sum(decisions(module, name) for name in one.called)
            total += (1 if trips is None else trips) * each
    return total


def _walk(
    module: Module, computation: str, times: int, ordinary: bool
) -> Iterator[Kernel]:
    here = module.computations[computation]
    for one in here.values():
        again, always = times, ordinary
        if one.opcode == "while":
            trips = trip_count(module, here, one)
            if trips is None:
                always = False
            else:
                again = times * trips
            yield from _walk(module, condition(one), times, ordinary)
        elif one.opcode == "conditional":
            always = False
        elif one.opcode not in ("call", "async-start"):
            if not _is_free(one):
                yield _kernel(module, computation, one, times, ordinary)
            continue
        for name in one.called:
            yield from _walk(module, name, again, always)


def _is_free(one: Instruction) -> bool:
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return True
    kernel = (
        one.called
        or _CYCLES.search(one.line)
        or one.opcode.startswith(("custom-call", *_collectives.KINDS))
    )
    # The rest of the arithmetic of scalars is done beside the kernels.
    return not kernel and all(a.size < 2 for a in one.results)


def _kernel(
    module: Module,
    computation: str,
    one: Instruction,
    times: int,
    ordinary: bool,
) -> Kernel:
    every = [one, *fused(module, one)]
    traffic: dict[str, _collectives.Traffic] = {}
    for each in every:
        for kind, more in _collectives.parse(each.line).items():
            old = traffic.get(kind, _collectives.Traffic(0, 0))
            traffic[kind] = _collectives.Traffic(
                old.count + more.count, old.bytes + more.bytes
            )
    here = module.computations[computation]
    cycles = _CYCLES.search(one.line)
    return Kernel(
        instruction=one,
        inside=frozenset(each.opcode for each in every),
        operands=tuple(
            a for n in one.operands if n in here for a in here[n].results
        ),
        cycles=int(cycles[1]) if cycles else 0,
        bytes=moved(module, here, one),
        collectives=traffic,
        times=times,
        ordinary=ordinary,
    )
