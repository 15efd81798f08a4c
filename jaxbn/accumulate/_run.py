"""Evaluates a program, microbatch after microbatch, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.accumulate._loop import Job, Stack, loop
from jaxbn.accumulate._nodes import Node, Program
from jaxbn.accumulate._plan import Segment, plan


def evaluate(
    program: Program, values: Sequence[jax.Array | Stack]
) -> list[jax.Array]:
    """Evaluates a program; stacked results get a new first axis.

    Args:
      program: of `trace`.
      values: of its inputs; a Stack where it differs between microbatches.

    Returns:
      The results.
    """
    shared = dict(program.constants)
    stacks: dict[int, Stack] = {}
    for number, value in zip(program.inputs, values):
        if isinstance(value, Stack):
            stacks[number] = value
        else:
            shared[number] = value
    token = jnp.int32(0)
    for segment in plan(program):
        for node in segment.shared:
            _evaluate(node, shared, shared)
        totals, token = _run_segment(program, segment, shared, stacks, token)
        for node in segment.ends:
            operands: list[Any] = [
                totals[i]
                if node.collective == "sum"
                else _together(program, i, shared, stacks)
                if node.collective == "stack"
                else _stack_or_one(program, i, shared, stacks)
                for i in node.inputs
            ]
            for out, result in zip(node.outputs, node.run(*operands)):
                if program.stacked[out]:
                    stacks[out] = Stack(result)
                else:
                    shared[out] = result
    return [
        _together(program, i, shared, stacks)
        if program.stacked[i]
        else shared[i]
        for i in program.outputs
    ]


def _evaluate(
    node: Node, known: dict[int, Any], shared: dict[int, Any]
) -> None:
    inputs = (known[i] if i in known else shared[i] for i in node.inputs)
    known.update(zip(node.outputs, node.run(*inputs)))


def _together(
    program: Program,
    value: int,
    shared: dict[int, Any],
    stacks: dict[int, Stack],
) -> jax.Array:
    """Returns a value of all microbatches along a new first axis."""
    if value == program.index:
        return jnp.arange(program.size, dtype=jnp.int32)
    if value in stacks:
        return stacks[value].together()
    one = jnp.asarray(shared[value])
    return jnp.broadcast_to(one, (program.size, *one.shape))


def _stack_or_one(
    program: Program,
    value: int,
    shared: dict[int, Any],
    stacks: dict[int, Stack],
) -> jax.Array | Stack:
    if value == program.index:
        return Stack(_together(program, value, shared, stacks))
    return stacks[value] if program.stacked[value] else shared[value]


def _run_segment(
    program: Program,
    segment: Segment,
    shared: dict[int, Any],
    stacks: dict[int, Stack],
    token: jax.Array,
) -> tuple[dict[int, jax.Array], jax.Array]:
    """Returns the sums of a segment; what it keeps is added to stacks."""
    if not (segment.nodes or segment.sums or segment.keeps):
        return {}, token

    def body(index: jax.Array, values: dict[int, Any]) -> tuple[Any, Any]:
        known = {**values, program.index: index}
        for node in segment.nodes:
            _evaluate(node, known, shared)
        sums = {i: known[i] for i in segment.sums}
        return sums, {i: known[i] for i in segment.keeps}

    kinds = program.kinds
    job = Job(
        body,
        reads={i: stacks[i] for i in segment.reads if i != program.index},
        sums={i: kinds[i] for i in segment.sums},
        keeps={i: kinds[i] for i in segment.keeps},
        places=segment.places,
    )
    totals, kept, token = loop(
        job, token, size=program.size, axis_name=program.axis_name
    )
    stacks.update(kept)
    return totals, token
