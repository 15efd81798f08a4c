"""The text of an optimized program as instructions and computations."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)"
    r"=%?([\w.-]+)"
)
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{(.*?)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_CONSTANT = re.compile(r" constant\((-?\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """Shape, dtype and place of an array.

    Attributes:
      dtype: HLO's name, such as f32.
      shape: of the array.
      space: of memory; 0 is the main memory, and on TPU 1 the chip's own.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.size * int(bits[0] if bits else 8) / 8)


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: such as fusion.
      results: arrays of its result, tuples flattened.
      operands: names of instructions.
      called: names of computations; of a while the body.
      root: whether it is what the computation returns.
      line: the whole of it.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    root: bool
    line: str


class Module(NamedTuple):
    """A program.

    Attributes:
      entry: name of the computation that it begins with.
      computations: instructions by name, of each computation by name.
      main: memory spaces that lie outside the chip.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]
    main: frozenset[int]


def parse(text: str, *, main: Collection[int] = (0,)) -> Module:
    """Reads what `jax.stages.Compiled.as_text` returns.

    Args:
      text: of an optimized module.
      main: memory spaces that lie outside the chip: 0, and on GPU 1, from
        which collectives read.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _INSTRUCTION.match(_COMMENT.sub("", line))
            if found:
                one = _instruction(found)
                current[one.name] = one
    if not entry:
        raise ValueError("The text has no ENTRY computation; it is not HLO.")
    return Module(entry, computations, frozenset(main))


def fused(module: Module, one: Instruction) -> Iterator[Instruction]:
    """Returns all instructions of the computations that one calls."""
    for name in one.called:
        for each in module.computations.get(name, {}).values():
            yield each
            yield from fused(module, each)


def condition(one: Instruction) -> str:
    """Returns the computation that tells a loop whether to go on."""
    found = _CONDITION.search(one.line)
    return found[1] if found else ""


def trip_count(
    module: Module, here: dict[str, Instruction], one: Instruction
) -> int | None:
    """Returns how often the body of a loop runs, if that is fixed.

    The compiler for GPUs writes it down. That for TPUs does not: there it is
    read off a condition that is nothing but `i < constant` and an i that
    starts from a constant, as those of `lax.scan` are; i is taken to rise by 1.

    Args:
      module: the program.
      here: the computation that the loop stands in.
      one: the loop.
    """
    known = _TRIPS.search(one.line)
    if known:
        return int(known[1])
    inside = module.computations.get(condition(one), {})
    root = next((each for each in inside.values() if each.root), None)
    if root is None or "direction=LT" not in root.line:
        return None
    number, end = (inside.get(name) for name in root.operands)
    if not (number and end) or number.opcode != "get-tuple-element":
        return None
    index, start = int(_INDEX.search(number.line)[1]), here[one.operands[0]]
    if start.opcode != "tuple":
        return None
    start = here[start.operands[index]]
    while start.opcode in ("bitcast", "copy", "copy-done", "copy-start"):
        start = here[start.operands[0]]
    first, last = (_CONSTANT.search(each.line) for each in (start, end))
    return int(last[1]) - int(first[1]) if first and last else None


def _instruction(found: re.Match[str]) -> Instruction:
    root, name, results, opcode, rest = found.groups()
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside, after = rest[: end - 1], rest[end:]
    called = _CALLED.findall(after)
    for names in _LISTED.findall(after):
        called += re.findall(r"%?([\w.-]+)", names)
    return Instruction(
        name=name,
        opcode=opcode,
        results=tuple(_arrays(results)),
        operands=tuple(re.findall(r"%([\w.-]+)", inside)),
        called=tuple(called),
        root=bool(root),
        line=found[0],
    )


def _arrays(shapes: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shapes):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(n.strip("<=")) for n in dims.split(",") if n)
        yield Array(dtype, shape, int(space[1]) if space else 0)
