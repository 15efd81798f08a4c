"""Scans that communicate over the microbatches, as stacked layers do.

Their steps are written out, to be cut at the collectives. What a step leaves for
the same step of another scan, such as the backward pass, goes there directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxbn.accumulate._nodes import Program
from jaxbn.accumulate._rebuild import scan_lengths

# (program, jaxpr, constants, inputs, floor) -> outputs
Inline = Callable[..., list[int]]


def add_scan(
    program: Program,
    eqn: jex.JaxprEqn,
    inputs: Sequence[int],
    floor: int,
    inline: Inline,
) -> list[int]:
    """Appends all steps of a scan; returns its outputs."""
    params = eqn.params
    closed, length = params["jaxpr"], params["length"]
    first, carried = scan_lengths(params)
    last = first + carried
    kinds = [var.aval for var in closed.jaxpr.invars[last:]]
    carry = list(inputs[first:last])
    rows: list[list[int]] = [[] for _ in range(length)]
    steps = range(length)
    for i in reversed(steps) if params["reverse"] else steps:
        own = [
            _row(program, x, i, kind, floor)
            for x, kind in zip(inputs[last:], kinds)
        ]
        given = [*inputs[:first], *carry, *own]
        out = inline(program, closed.jaxpr, closed.consts, given, floor)
        carry, rows[i] = out[:carried], out[carried:]
    results = [var.aval for var in eqn.outvars[carried:]]
    return carry + [
        program.add_stack([row[j] for row in rows], kind)
        for j, kind in enumerate(results)
    ]


def _row(program: Program, x: int, index: int, kind: Any, floor: int) -> int:
    if x in program.rows:
        return program.rows[x][index]
    run = functools.partial(_at, index)
    return program.add("slice", run, [x], [kind], cheap=True, floor=floor)[0]


def _at(index: int, x: jax.Array) -> list[jax.Array]:
    return [jax.lax.index_in_dim(x, index, keepdims=False)]
