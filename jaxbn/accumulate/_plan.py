"""Plans what each segment of a program computes and keeps.

Values that a segment needs from earlier ones are kept for all microbatches;
all others exist for one microbatch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxbn.accumulate._nodes import Node, Program

# Recomputing a value may read up to this many times its size. Without a limit,
# residual networks would go back to their input in every block.
_READS = 4


class Segment(NamedTuple):
    """The code between two collectives."""

    shared: tuple[Node, ...]  # run once, before the loop
    reads: tuple[int, ...]  # stacked values
    nodes: tuple[Node, ...]  # run for every microbatch
    keeps: tuple[int, ...]  # stacked values that later segments read
    places: dict[int, int]  # one of keeps -> one of reads that it overwrites
    sums: tuple[int, ...]  # values that a collective adds up
    ends: tuple[Node, ...]  # the collectives


def plan(program: Program) -> list[Segment]:
    """Decides what is kept, from the last segment to the first.

    Of the values that a segment needs from earlier ones, cheap ones are
    recomputed if their inputs are kept anyway; all others are kept.
    """
    inputs = {*program.inputs, program.index}
    keep = {i for i in program.outputs if program.stacked[i]} - inputs
    nodes = _needed(program)
    segments = []
    for level in range(max([n.level for n in nodes], default=0), -1, -1):
        here = [node for node in nodes if node.level == level]
        ends = [node for node in here if node.collective]
        effects = [node for node in here if node.stacked and not node.outputs]
        keep -= {i for node in ends for i in node.outputs}
        summed, stacked = (
            {
                i
                for node in ends
                if (node.collective == "sum") == is_sum
                for i in node.inputs
                if program.stacked[i]
            }
            for is_sum in (True, False)
        )
        work, loads = _slice(
            program,
            level,
            keep.union(summed, stacked, *(node.inputs for node in effects)),
        )
        work.update(effects)
        reads = loads & summed.union(*(node.inputs for node in work))
        writes = (keep | stacked) - loads - inputs
        dying = reads - keep - stacked - inputs
        segments.append(
            Segment(
                shared=tuple(node for node in here if not node.stacked),
                reads=tuple(sorted(reads)),
                nodes=tuple(node for node in program.nodes if node in work),
                keeps=tuple(sorted(writes)),
                places=_places(program, work, writes, dying),
                sums=tuple(sorted(summed)),
                ends=tuple(ends),
            )
        )
        keep = loads - inputs
    return segments[::-1]


def _needed(program: Program) -> list[Node]:
    """Returns the nodes that a result or an effect depends on."""
    wanted = set(program.outputs)
    nodes = []
    for node in reversed(program.nodes):
        if not node.outputs or not wanted.isdisjoint(node.outputs):
            wanted.update(node.inputs)
            nodes.append(node)
    return nodes[::-1]


def _slice(
    program: Program, level: int, want: Iterable[int]
) -> tuple[set[Node], set[int]]:
    """Returns the nodes that compute want, and the stacked values they read."""
    nodes, found = _walk(program, want, lambda node: node.level == level)
    earlier = {
        i for i in found if i in program.maker and program.maker[i].cheap
    }
    loads = found - earlier
    free = {*program.inputs, program.index}
    for value in sorted(earlier):
        again, leaves = _walk(
            program, [value], lambda node: node.cheap, stop=loads
        )
        missing = leaves - loads - free
        cost = sum(program.bytes(i) for i in missing)
        # Values that exist already need no new array.
        level_of = program.levels.__getitem__
        there = all(level_of(i) < level_of(value) for i in missing)
        size = program.kinds[value].size
        read = sum(program.kinds[i].size for i in leaves)
        if cost - there < program.bytes(value) and read <= _READS * size:
            nodes |= again
            loads |= leaves
        else:
            loads.add(value)
    return nodes, loads


def _walk(
    program: Program,
    want: Iterable[int],
    enters: Callable[[Node], bool],
    stop: Iterable[int] = (),
) -> tuple[set[Node], set[int]]:
    """Walks back from want; returns nodes, and the stacked values they read."""
    nodes: set[Node] = set()
    ends: set[int] = set()
    stack, seen = list(want), set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = program.maker.get(value)
        stacked = program.stacked[value]
        wanted = stacked and value not in stop
        if node is not None and (
            value in program.inline or (wanted and enters(node))
        ):
            nodes.add(node)
            stack.extend(node.inputs)
        elif stacked:
            ends.add(value)
    return nodes, ends


def _places(
    program: Program,
    work: set[Node],
    writes: Iterable[int],
    dying: Iterable[int],
) -> dict[int, int]:
    """Finds arrays of the same type to overwrite.

    Only inputs of the new value: if a read and a write are not ordered, a
    compiler copies the array.
    """
    places: dict[int, int] = {}
    left = set(dying)
    for value in sorted(writes):
        _, made_of = _walk(program, [value], work.__contains__)
        for old in sorted(left & made_of):
            if program.kinds[old] == program.kinds[value]:
                places[value] = old
                left.remove(old)
                break
    return places
