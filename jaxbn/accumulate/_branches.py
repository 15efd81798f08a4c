"""Branches that communicate over the microbatches, as batch norm's second pass.

All microbatches take the same branch, since the index of it is one they share.
So a branch is a program of its own, which runs in lockstep where it is taken.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxbn.accumulate._loop import Stack
from jaxbn.accumulate._nodes import Program
from jaxbn.accumulate._run import evaluate

# (program, jaxpr, constants, inputs, floor) -> outputs
Inline = Callable[..., list[int]]


def add_branches(
    program: Program,
    eqn: jex.JaxprEqn,
    inputs: list[int],
    floor: int,
    inline: Inline,
) -> list[int]:
    """Appends a conditional as one node; returns its outputs."""
    _, *operands = inputs
    branches = []
    for closed in eqn.params["branches"]:
        branch = Program(program.axis_name, program.size)
        branch.inputs = [
            branch.value(var.aval, program.stacked[i])
            for var, i in zip(closed.jaxpr.invars, operands)
        ]
        branch.outputs = inline(
            branch, closed.jaxpr, closed.consts, branch.inputs, 0
        )
        branches.append(branch)
    stacked = [
        any(branch.stacked[branch.outputs[i]] for branch in branches)
        for i in range(len(eqn.outvars))
    ]

    def run(index: jax.Array, *values: jax.Array | Stack) -> list[jax.Array]:
        def take(branch: Program) -> list[jax.Array]:
            out = evaluate(branch, values)
            return [
                jnp.broadcast_to(value, (program.size, *value.shape))
                if differs and not branch.stacked[i]
                else value
                for value, differs, i in zip(out, stacked, branch.outputs)
            ]

        out: list[jax.Array] = jax.lax.switch(
            index, [lambda b=branch: take(b) for branch in branches]
        )
        return out

    return program.add_collective(
        "cond",
        run,
        inputs,
        [var.aval for var in eqn.outvars],
        collective="branches",
        floor=floor,
        stacked=stacked,
    )
