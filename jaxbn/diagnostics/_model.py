"""Calls to loss and model, with checks of what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._check_values import is_known
from jaxbn._checks import describe

Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]
Apply = Callable[..., jax.Array]


def scalar_loss(
    loss: Loss, batch_stats: Any, batch: Any
) -> Callable[[Any], jax.Array]:
    """Returns params -> scalar loss; new running statistics are discarded."""

    def scalar(params: Any) -> jax.Array:
        found = loss(params, batch_stats, batch)
        pair = isinstance(found, tuple) and len(found) == 2
        if not pair or jnp.shape(found[0]) != ():
            raise ValueError(
                "loss(params, batch_stats, batch) must return (scalar, "
                f"new_batch_stats); got {_describe_result(found)}."
            )
        return found[0]

    return scalar


def checked_logits(
    apply: Apply, params: Any, batch_stats: Any, x: jax.Array, *, train: bool
) -> jax.Array:
    """Returns the logits of x, (B, C)."""
    found = apply(params, batch_stats, x, train=train)
    if not hasattr(found, "shape") or found.ndim != 2 or len(found) != len(x):
        raise ValueError(
            "apply(params, batch_stats, x, train=...) must return logits "
            f"(B, C) alone, for x {describe(x)}; got {_describe_result(found)}."
        )
    return found


def map_rows(fn: Callable[..., Any], xs: Any, *, unroll: bool) -> Any:
    """Maps fn over the leading axis of xs, in a loop or unrolled.

    A loop compiles fn once, but on CPU, XLA runs convolutions inside a loop
    many times slower.
    """
    if not unroll:
        return jax.lax.map(fn, xs)
    length = len(jax.tree.leaves(xs)[0])
    rows = [fn(jax.tree.map(lambda a, i=i: a[i], xs)) for i in range(length)]
    return jax.tree.map(lambda *row: jnp.stack(row), *rows)


def check_steps(steps: Any) -> jax.Array:
    """Returns steps as an array (K,); raises ValueError unless positive."""
    steps = jnp.asarray(steps)
    if not jnp.issubdtype(steps.dtype, jnp.floating):
        steps = steps.astype(jnp.float32)
    if steps.ndim != 1 or not steps.size:
        raise ValueError(
            f"steps must be nonempty, of shape (K,); got {describe(steps)}."
        )
    if is_known(steps) and not (steps > 0).all():
        raise ValueError(
            f"steps must be positive, as learning rates are; got {steps}."
        )
    found: jax.Array = steps
    return found


def _describe_result(found: Any) -> str:
    if isinstance(found, tuple):
        return "(" + ", ".join(map(_describe_result, found)) + ")"
    if hasattr(found, "shape") and hasattr(found, "dtype"):
        return describe(found)
    return type(found).__name__
