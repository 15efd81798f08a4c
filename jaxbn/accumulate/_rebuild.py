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
    first, carried = scan_lengths(params)
    last = first + carried

    def step(carry: Sequence[Any], x: Sequence[Any]) -> Any:
        out = evaluate(params["jaxpr"], *inputs[:first], *carry, *x)
        return out[:carried], out[carried:]

    carry, out = jax.lax.scan(
        step,
        list(inputs[first:last]),
        list(inputs[last:]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *out]


def scan_lengths(params: dict[str, Any]) -> tuple[int, int]:
    """How many inputs are the same in every step, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # jax 0.12 keeps trees in their place.
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


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
