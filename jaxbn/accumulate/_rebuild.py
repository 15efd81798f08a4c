"""Loops and branches whose code is traced a second time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

# (code, *inputs) -> outputs
Evaluate = Callable[..., list[Any]]


def _scan(
    evaluate: Evaluate, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    first = params["num_consts"]
    last = first + params["num_carry"]

    def step(carry: Sequence[Any], x: Sequence[Any]) -> Any:
        out = evaluate(params["jaxpr"], *inputs[:first], *carry, *x)
        return out[: last - first], out[last - first :]

    carry, out = jax.lax.scan(
        step,
        list(inputs[first:last]),
        list(inputs[last:]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *out]


def _while(
    evaluate: Evaluate, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]

    def goes_on(carry: Sequence[Any]) -> Any:
        return evaluate(params["cond_jaxpr"], *inputs[:first], *carry)[0]

    def step(carry: Sequence[Any]) -> list[Any]:
        return evaluate(params["body_jaxpr"], *inputs[first:last], *carry)

    return jax.lax.while_loop(goes_on, step, list(inputs[last:]))


def _cond(
    evaluate: Evaluate, params: dict[str, Any], *inputs: Any
) -> list[Any]:
    branches = [functools.partial(evaluate, b) for b in params["branches"]]
    out: list[Any] = jax.lax.switch(inputs[0], branches, *inputs[1:])
    return out


# By the name of the primitive: (evaluate, params, *inputs) -> outputs.
REBUILD = {"scan": _scan, "while": _while, "cond": _cond}
