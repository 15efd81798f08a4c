"""Conditionals and scans with collectives over the microbatches.

All microbatches take the same branch, since they share its index. So a branch,
such as batch norm's second pass, is a program of its own, which runs in
lockstep if it is taken. A scan, such as over stacked layers, is unrolled, to
split it at its collectives. Residuals of a step are passed to the same step of
another scan, such as that of the backward pass, without stacking them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._compat.jaxprs import scan_lengths, without_constants
from jaxbn._jaxpr import choose
from jaxbn.accumulate._loop import Stack
from jaxbn.accumulate._nodes import Program, Site
from jaxbn.accumulate._run import evaluate

# (program, code, inputs, floor) -> outputs
Inline = Callable[..., list[int]]


def add_branches(site: Site, inline: Inline) -> list[int]:
    """Appends a conditional as one node; returns its outputs."""
    program = site.program
    _, *operands = site.inputs
    branches = []
    for code in site.params["branches"]:
        branch = Program(program.axis_name, program.size)
        branch.inputs = [
            branch.value(var.aval, program.stacked[i])
            for var, i in zip(without_constants(code).invars, operands)
        ]
        branch.outputs = inline(branch, code, branch.inputs, 0)
        branches.append(branch)
    stacked = [
        any(branch.stacked[branch.outputs[i]] for branch in branches)
        for i in range(len(site.eqn.outvars))
    ]

    def take(branch: Program, *values: jax.Array | Stack) -> list[jax.Array]:
        out = evaluate(branch, values)
        return [
            jnp.broadcast_to(value, (program.size, *value.shape))
            if differs and not branch.stacked[i]
            else value
            for value, differs, i in zip(out, stacked, branch.outputs)
        ]

    def run(index: jax.Array, *values: jax.Array | Stack) -> list[jax.Array]:
        taken = [functools.partial(take, b, *values) for b in branches]
        out: list[jax.Array] = choose(site.params, taken, index)
        return out

    return site.add(run, collective="branches", stacked=stacked)


def add_scan(site: Site, inline: Inline) -> list[int]:
    """Appends the unrolled steps of a scan; returns its outputs."""
    code, length = site.params["jaxpr"], site.params["length"]
    first, carried = scan_lengths(site.params)
    last = first + carried
    carry = list(site.inputs[first:last])
    rows: list[list[int]] = [[] for _ in range(length)]
    kinds = [var.aval for var in without_constants(code).invars[last:]]
    steps = range(length)
    for i in reversed(steps) if site.params["reverse"] else steps:
        own = [
            _row(site, x, i, kind) for x, kind in zip(site.inputs[last:], kinds)
        ]
        given = [*site.inputs[:first], *carry, *own]
        out = inline(site.program, code, given, site.floor)
        carry, rows[i] = out[:carried], out[carried:]
    results = [var.aval for var in site.eqn.outvars[carried:]]
    return carry + [
        site.program.add_stack([row[j] for row in rows], kind)
        for j, kind in enumerate(results)
    ]


def _row(site: Site, x: int, index: int, kind: Any) -> int:
    program = site.program
    if x in program.rows:
        return program.rows[x][index]
    run = functools.partial(_at, index)
    return program.add(run, [x], [kind], cheap=True, floor=site.floor)[0]


def _at(index: int, x: Any) -> list[jax.Array]:
    return [jax.lax.index_in_dim(x, index, keepdims=False)]
