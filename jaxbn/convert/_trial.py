"""Whether a layer computes what flax's BatchNorm does, by computing both."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_TOLERANCE = 1e-3  # of the largest value; flax's own variance rounds


def run_apart(trial: Callable[[], str | None]) -> str | None:
    """Returns what a trial returns, or why there could be none.

    In a thread of its own there is neither a trace nor a running model.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(trial).result()
        except Exception as error:
            text = str(error).partition("\n")[0]
            return f"which cannot be tried out alone ({text})"


def difference(
    theirs: Callable[[Any], dict[str, Any]],
    flaxs: Callable[[Any], dict[str, Any]],
    shape: tuple[int, ...],
    epsilon: float,
) -> str | None:
    """Returns which result differs; None for none.

    Args:
      theirs: from x to results by name.
      flaxs: the same of flax's layer.
      shape: of x.
      epsilon: of both layers.
    """
    rng = np.random.default_rng(0)
    # Skewed, because of normal values other formulas may give the same.
    x = rng.exponential(2, shape).astype(np.float32)
    small = np.float32(max(epsilon, 1e-12) ** 0.5 / 2)
    got, want = jax.jit(theirs), jax.jit(flaxs)
    # As they are, and so small that all depends on epsilon.
    for scaled in (x + 1, x * small):
        for (what, a), b in zip(got(scaled).items(), want(scaled).values()):
            if not all(jax.tree.leaves(jax.tree.map(_agree, a, b))):
                return str(what)
    return None


def random_values(like: Any) -> Any:
    """Returns a tree of arrays of the shapes of like, from 0.5 to 2."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: rng.uniform(0.5, 2, a.shape).astype(a.dtype), like
    )


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Returns what to weigh an output with, for a loss."""
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def _agree(a: Any, b: Any) -> bool:
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    bound = _TOLERANCE * max(float(abs(b).max(initial=0)), 1e-6)
    return a.shape == b.shape and bool((abs(a - b) <= bound).all())
