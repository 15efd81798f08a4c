"""A function of one microbatch as a list of nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._compat.jaxprs import Equation, named_axes

Run = Callable[..., Sequence[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One equation; inputs and outputs are indices of values.

    A stacked value differs between microbatches; any other exists once. The
    level of a value is the number of consecutive collectives over microbatches
    that it depends on; segment l lies between the collectives of levels l - 1
    and l. A node can run in the segment of its level or a later one.
    """

    run: Run
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: bool
    level: int
    cheap: bool  # recompute its outputs rather than keep them
    # What run takes: "sum", the sum over all microbatches; "stack", all of them
    # along a new first axis; "branches", several values, stacked ones as a
    # Stack.
    collective: str | None = None


class Program:
    """Nodes in an order in which they can run.

    Attributes:
      axis_name: name of the axis of microbatches.
      size: number of microbatches.
      nodes: all equations, with calls inlined.
      maker: index of a value -> its node; arguments and constants have none.
      kinds: type of each value, for one microbatch.
      stacked: whether each value differs between microbatches.
      levels: level of each value, see Node.
      inline: values that are not stacked, but so large and cheap that each
        microbatch computes them.
      rows: index of a value of `add_stack` -> indices of its rows.
      constants: values known while tracing, by index.
      index: the value that is the index of the microbatch.
      inputs: indices of the arguments.
      outputs: indices of the results.
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
        """Returns the index of a new value."""
        self.kinds.append(kind)
        self.stacked.append(stacked)
        self.levels.append(level)
        return len(self.kinds) - 1

    def constant(self, array: Any, kind: Any) -> int:
        """Returns the index of a new constant."""
        number = self.value(kind, False)
        self.constants[number] = array
        return number

    def add(
        self,
        run: Run,
        inputs: Sequence[int],
        kinds: Sequence[Any],
        *,
        cheap: bool = False,
        floor: int = 0,
        collective: str | None = None,
        stacked: Sequence[bool] | None = None,
    ) -> list[int]:
        """Appends a node of at least level floor; returns its outputs.

        Args:
          run: values of the inputs -> values of the outputs.
          inputs: indices of values.
          kinds: types of the outputs.
          cheap: see Node.
          floor: the lowest level it may have.
          collective: see Node.
          stacked: which outputs of a collective differ between microbatches;
            None means none.
        """
        level = max([floor, *(self.levels[i] for i in inputs)])
        if collective:
            differs, after = True, level + 1
            own = stacked or [False] * len(kinds)
        else:
            differs, after = any(self.stacked[i] for i in inputs), level
            own = [differs] * len(kinds)
        outputs = [self.value(kind, s, after) for kind, s in zip(kinds, own)]
        if cheap and not differs:
            read = max([self.kinds[i].size for i in inputs], default=0)
            grows = any(kind.size > max(read, 1) for kind in kinds)
            if grows or not self.inline.isdisjoint(inputs):
                self.inline.update(outputs)
        node = Node(
            run,
            tuple(inputs),
            tuple(outputs),
            differs,
            level,
            cheap,
            collective,
        )
        self.nodes.append(node)
        self.maker.update(dict.fromkeys(outputs, node))
        return outputs

    def add_stack(self, rows: list[int], kind: Any) -> int:
        """Appends the stack of other values along a new first axis."""
        (number,) = self.add(_stack, rows, [kind])
        self.rows[number] = rows
        return number

    def add_mean(self, number: int) -> int:
        """Appends the mean of a value over the microbatches."""
        if not self.stacked[number]:
            return number
        if number in self.rows:
            # Row by row, so that no row must be kept until the last one.
            means = [self.add_mean(row) for row in self.rows[number]]
            return self.add_stack(means, self.kinds[number])
        (mean,) = self.add(
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


class Site(NamedTuple):
    """An equation, with its inputs and lowest level in a program."""

    program: Program
    eqn: Equation
    inputs: Sequence[int]  # values that it reads
    floor: int  # the lowest level of its nodes

    @property
    def name(self) -> str:
        return str(self.eqn.primitive.name)

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def other_axes(self) -> tuple[Hashable, ...]:
        """Returns its named axes except that of the microbatches."""
        own = self.program.axis_name
        return tuple(axis for axis in named_axes(self.eqn) if axis != own)

    def add(self, run: Run, **options: Any) -> list[int]:
        """Appends the equation as one node; see `Program.add`."""
        kinds = [var.aval for var in self.eqn.outvars]
        return self.program.add(
            run, self.inputs, kinds, floor=self.floor, **options
        )


def _stack(*rows: jax.Array) -> list[jax.Array]:
    return [jnp.stack(rows)]
