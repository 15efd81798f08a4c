"""An LSTM with batch norm between its timesteps, as pure functions."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxbn

UNITS = 48
EPSILON = 1e-3


class Lstm(NamedTuple):
    """Output for a batch."""

    logits: jax.Array  # (B, K)
    # (T, C) each: of the input's part, the hidden state's, and the cell.
    moments: tuple[jaxbn.Moments, ...]


def init(
    key: jax.Array, inputs: int, classes: int, *, norm: bool, scale: float = 0.1
) -> dict[str, jax.Array]:
    """Draws the parameters; the forget gate's bias starts at 1."""
    keys = jax.random.split(key, 3)
    gates = 4 * UNITS
    hidden = jax.random.orthogonal(keys[1], UNITS, (4,)).transpose(1, 0, 2)
    params = {
        "input": jax.random.normal(keys[0], (inputs, gates)) / inputs**0.5,
        "hidden": hidden.reshape(UNITS, gates),
        "bias": jnp.zeros(gates).at[UNITS : 2 * UNITS].set(1),
        "head": jax.random.normal(keys[2], (UNITS, classes)) / UNITS**0.5,
        "head_bias": jnp.zeros(classes),
    }
    if norm:
        for name, size in ("input", gates), ("hidden", gates), ("cell", UNITS):
            params[f"{name}_scale"] = jnp.full(size, scale)
        params["cell_bias"] = jnp.zeros(UNITS)
    return params


def apply(
    params: dict[str, jax.Array],
    x: jax.Array,
    start: jax.Array,
    *,
    statistics: Any = None,
    perturbation: jax.Array | None = None,
) -> Lstm:
    """Runs an LSTM, with batch norm if params have scales.

    The contributions of input and hidden state to the gates are normalized
    separately, the cell only where it enters the hidden state.

    Source: Cooijmans et al. (2017), Recurrent Batch Normalization, section 3.

    Args:
      params: of `init`.
      x: (T, B, C).
      start: (B, H), the initial hidden state.
      statistics: of input, hidden state and cell, (T, C) each, for inference.
      perturbation: (T, B, H), added to each hidden state, to differentiate with
        respect to it.
    """
    norm = "input_scale" in params

    def normal(name, h, known):
        """Returns normalized h, and its moments unless `known`."""
        if not norm:
            return h, None
        affine = params[f"{name}_scale"], params.get(f"{name}_bias")
        if known is None:
            return jaxbn.batch_norm(h, *affine, epsilon=EPSILON)
        mean, var, _ = known
        return jaxbn.normalize(h, mean, var, *affine, epsilon=EPSILON), None

    def step(carry, given):
        hidden, cell = carry
        gates, (of_hidden, of_cell), perturbation = given
        more, first = normal("hidden", hidden @ params["hidden"], of_hidden)
        input_gate, forget_gate, output_gate, candidate = jnp.split(
            gates + more, 4, axis=-1
        )
        cell = jax.nn.sigmoid(forget_gate) * cell
        cell += jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
        normalized, second = normal("cell", cell, of_cell)
        hidden = jax.nn.sigmoid(output_gate) * jnp.tanh(normalized)
        if perturbation is not None:
            hidden += perturbation
        return (hidden, cell), (first, second)

    # The contribution of the input to all timesteps at once.
    of_input, *known = statistics or (None, None, None)
    gates, first = jax.vmap(functools.partial(normal, "input"))(
        x @ params["input"], of_input
    )
    given = gates + params["bias"], tuple(known), perturbation
    carry = start, jnp.zeros_like(start)
    (hidden, _), rest = jax.lax.scan(step, carry, given)
    logits = hidden @ params["head"] + params["head_bias"]
    return Lstm(logits, (first, *rest) if norm else ())
