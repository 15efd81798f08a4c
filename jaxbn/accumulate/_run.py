"""Evaluates a program by segments, one microbatch after the other in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.accumulate._loop import Stack, loop
from jaxbn.accumulate._nodes import Node, Program
from jaxbn.accumulate._plan import Segment, plan


def evaluate(
    program: Program, values: Sequence[jax.Array | Stack]
) -> list[jax.Array]:
    """Evaluates a program; stacked results get a new first axis.

    Args:
      program: result of `trace`.
      values: its inputs; a Stack where microbatches differ.

    Returns:
      The results.
    """
    state = _State(program, values)
    for segment in plan(program):
        state.run(segment)
    return [
        state.stack(i).together() if program.stacked[i] else state.shared[i]
        for i in program.outputs
    ]


class _State:
    """Values of a running program.

    Attributes:
      shared: values that all microbatches share, by index.
      stacks: values of all microbatches, by index.
      token: integer that depends on everything computed so far.
    """

    def __init__(
        self, program: Program, values: Sequence[jax.Array | Stack]
    ) -> None:
        self._program = program
        self.shared: dict[int, Any] = dict(program.constants)
        self.stacks: dict[int, Stack] = {}
        for number, value in zip(program.inputs, values):
            self._keep(number, value)
        self.token = jnp.int32(0)

    def _keep(self, number: int, value: Any) -> None:
        if isinstance(value, Stack):
            self.stacks[number] = value
        else:
            self.shared[number] = value

    def stack(self, number: int) -> Stack:
        """Returns the Stack of a value, which may be shared."""
        size = self._program.size
        if number in self.stacks:
            return self.stacks[number]
        if number == self._program.index:
            return Stack(jnp.arange(size, dtype=jnp.int32))
        one = jnp.asarray(self.shared[number])
        return Stack(jnp.broadcast_to(one, (size, *one.shape)))

    def run(self, segment: Segment) -> None:
        stacked = self._program.stacked
        for node in segment.shared:
            self._evaluate(node, self.shared)
        totals = self._run_microbatches(segment)
        for node in segment.ends:
            operands: list[Any] = [
                totals[i]
                if node.collective == "sum"
                else self.stack(i).together()
                if node.collective == "stack"
                # For branches.
                else self.stack(i)
                if stacked[i]
                else self.shared[i]
                for i in node.inputs
            ]
            for out, result in zip(node.outputs, node.run(*operands)):
                self._keep(out, Stack(result) if stacked[out] else result)

    def _evaluate(self, node: Node, known: dict[int, Any]) -> None:
        inputs = (
            known[i] if i in known else self.shared[i] for i in node.inputs
        )
        known.update(zip(node.outputs, node.run(*inputs)))

    def _run_microbatches(self, segment: Segment) -> dict[int, jax.Array]:
        """Returns the sums of a segment; adds the values it keeps to stacks."""
        if not (segment.nodes or segment.sums or segment.keeps):
            return {}
        program = self._program

        def body(index: jax.Array, values: dict[int, Any]) -> dict[int, Any]:
            known = {**values, program.index: index}
            for node in segment.nodes:
                self._evaluate(node, known)
            return known

        totals, kept, self.token = loop(
            program, segment, body, self.stacks, self.token
        )
        self.stacks.update(kept)
        return totals
