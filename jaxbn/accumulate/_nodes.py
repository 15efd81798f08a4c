"""A function of one microbatch as a list of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[..., Sequence[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation; inputs and outputs are numbers of values.

    A stacked value differs between microbatches; any other exists once. The
    level of a value says how many collectives over the microbatches, one after
    the other, come before it; segment l lies between the collectives of level
    l - 1 and l. A node can run in the segment of its level and in later ones.
    """

    name: str
    run: Run
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: bool
    level: int
    cheap: bool  # rather run again than keep what it returns
    # "sum": run takes the sum over all microbatches; "stack": all of them, along
    # a new first axis; "branches": several values, stacked ones as a Stack.
    collective: str | None = None


class Program:
    """Nodes in an order in which they can run.

    Attributes:
      axis_name: the axis of the microbatches.
      size: their number.
      nodes: all equations, calls inlined.
      maker: the node of a value; arguments and constants have none.
      kinds: the type of a value of one microbatch, by number.
      stacked: whether it differs between microbatches, by number.
      levels: see Node, by number.
      inline: unstacked values so large and cheap that every microbatch makes
        its own.
      rows: what values made by `add_stack` are made of, by number.
      constants: values known while tracing.
      index: the value that is the number of the microbatch.
      inputs: values of the arguments.
      outputs: values of the results.
    """

    def __init__(self, axis_name: Hashable, size: int) -> None:
        self.axis_name = axis_name
        self.size = size
        self.nodes: list[Node] = []
        self.maker: dict[int, Node] = {}
        self.kinds: list[Any] = []
        self.stacked: list[bool] = []
        self.levels: list[int] = []
        self.inline: set[int] = set()
        self.rows: dict[int, list[int]] = {}
        self.constants: dict[int, Any] = {}
        self.index = self.value(jax.typeof(np.int32(0)), True)
        self.inputs: list[int] = []
        self.outputs: list[int] = []

    def value(self, kind: Any, stacked: bool, level: int = 0) -> int:
        """Returns the number of a new value."""
        self.kinds.append(kind)
        self.stacked.append(stacked)
        self.levels.append(level)
        return len(self.kinds) - 1

    def constant(self, array: Any, kind: Any) -> int:
        """Returns the number of a value that is known."""
        number = self.value(kind, False)
        self.constants[number] = array
        return number

    def add(
        self,
        name: str,
        run: Run,
        inputs: Sequence[int],
        kinds: Sequence[Any],
        *,
        cheap: bool = False,
        floor: int = 0,
    ) -> list[int]:
        """Appends a node of at least level floor; returns its outputs."""
        stacked = any(self.stacked[i] for i in inputs)
        level = max([floor, *(self.levels[i] for i in inputs)])
        outputs = [self.value(kind, stacked, level) for kind in kinds]
        if cheap and not stacked:
            read = max([self.kinds[i].size for i in inputs], default=0)
            grows = any(kind.size > max(read, 1) for kind in kinds)
            if grows or not self.inline.isdisjoint(inputs):
                self.inline.update(outputs)
        return self._append(
            Node(
                name,
                run,
                tuple(inputs),
                tuple(outputs),
                stacked,
                level,
                cheap,
            )
        )

    def add_collective(
        self,
        name: str,
        run: Run,
        inputs: Sequence[int],
        kinds: Sequence[Any],
        *,
        collective: str,
        floor: int = 0,
        stacked: Sequence[bool] | None = None,
    ) -> list[int]:
        """Appends a node over all microbatches; returns its outputs.

        stacked says which of them differ between microbatches; None: no one.
        """
        level = max([floor, *(self.levels[i] for i in inputs)])
        outputs = [
            self.value(kind, own, level + 1)
            for kind, own in zip(kinds, stacked or [False] * len(kinds))
        ]
        return self._append(
            Node(
                name,
                run,
                tuple(inputs),
                tuple(outputs),
                True,
                level,
                False,
                collective,
            )
        )

    def add_stack(self, rows: list[int], kind: Any) -> int:
        """Appends a value whose rows, along a new first axis, are others."""
        (number,) = self.add("stack", _stack, rows, [kind])
        self.rows[number] = rows
        return number

    def add_mean(self, number: int) -> int:
        """Appends the mean of a value over the microbatches."""
        if not self.stacked[number]:
            return number
        if number in self.rows:
            # Row by row, so that none waits for the last in all microbatches.
            means = [self.add_mean(row) for row in self.rows[number]]
            return self.add_stack(means, self.kinds[number])
        (mean,) = self.add_collective(
            "mean",
            lambda total: [total / self.size],
            [number],
            [self.kinds[number]],
            collective="sum",
        )
        return mean

    def bytes(self, number: int) -> int:
        """Returns the size of a value of one microbatch."""
        kind = self.kinds[number]
        size: int = kind.size * kind.dtype.itemsize
        return size

    def _append(self, node: Node) -> list[int]:
        self.nodes.append(node)
        self.maker.update(dict.fromkeys(node.outputs, node))
        return list(node.outputs)


def _stack(*rows: jax.Array) -> list[jax.Array]:
    return [jnp.stack(rows)]
