"""Bytes that a kernel reads from main memory and writes to it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.bench.compiled_hlo import Instruction, Module

# These read as much of their first operand as they return.
_PARTS = {"slice", "dynamic-slice", "gather", "slice-start"}
_NUMBER = re.compile(r" parameter\((\d+)\)")


def moved(
    module: Module, here: dict[str, Instruction], one: Instruction
) -> int:
    """Returns the bytes of operands and results in main memory.

    Of an operand that only slices of are read, inside a fusion too, the slices
    count; of a result that is updated in place, the update.

    Args:
      module: the program.
      here: the computation that the instruction stands in.
      one: the instruction.
    """
    return _read(module, here, one) + _written(module, here, one)


def _read(
    module: Module, here: dict[str, Instruction], one: Instruction
) -> int:
    """Returns the bytes that one reads from main memory, of a slice its own."""
    total = 0
    for name in dict.fromkeys(one.operands):
        if name in here and all(
            a.space in module.main for a in here[name].results
        ):
            whole = sum(a.bytes for a in here[name].results)
            total += min(whole, _used(module, here, name, [one], whole))
    return total


def _used(
    module: Module,
    here: dict[str, Instruction],
    name: str,
    users: Iterable[Instruction],
    whole: int,
) -> int:
    """Returns how many bytes of an array its users read."""
    total = 0
    for user in users:
        places = [i for i, each in enumerate(user.operands) if each == name]
        if user.opcode in _PARTS and places == [0]:
            total += user.results[-1 if "-" in user.opcode[-6:] else 0].bytes
        elif user.opcode == "dynamic-update-slice" and places == [0]:
            pass  # written in place
        elif user.opcode == "bitcast":
            total += _inside(module, here, user.name, whole)
        elif user.opcode == "fusion" and user.called[0] in module.computations:
            inner = module.computations[user.called[0]]
            for each in inner.values():
                number = _NUMBER.search(each.line)
                if number and int(number[1]) in places:
                    total += _inside(module, inner, each.name, whole)
        else:
            return whole
    return total


def _inside(
    module: Module, here: dict[str, Instruction], name: str, whole: int
) -> int:
    users = [each for each in here.values() if name in each.operands]
    return min(whole, _used(module, here, name, users, whole))


def _written(
    module: Module, here: dict[str, Instruction], one: Instruction
) -> int:
    """Returns the bytes that one writes to main memory."""
    results = one.results
    if one.opcode == "copy-start":
        results = results[:1]  # of (destination, source, state)
    elif one.opcode.endswith("-start") and one.opcode != "all-reduce-start":
        results = results[len(one.operands) : 2 * len(one.operands)]
    if one.opcode == "dynamic-update-slice":
        return sum(a.bytes for a in here[one.operands[1]].results)
    parts = [one]
    if one.opcode == "fusion" and one.called[0] in module.computations:
        here = module.computations[one.called[0]]
        root = next(each for each in here.values() if each.root)
        parts = [root]
        if root.opcode == "tuple":
            parts = [here[name] for name in root.operands]
    total = 0
    for part, result in zip(parts, results):
        if result.space in module.main:
            inner = part is not one and part.opcode in (
                "fusion",
                "dynamic-update-slice",
            )
            total += _written(module, here, part) if inner else result.bytes
    if len(parts) != len(results):
        total = sum(a.bytes for a in results if a.space in module.main)
    return total
