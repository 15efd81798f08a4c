"""Compares the results of a layer with those of flax's BatchNorm."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_ORDER = (
    "outputs",
    "running statistics",
    "outputs in inference",
    "gradients",
)
_TOLERANCE = 1e-3  # of the largest value; flax's own variance rounds


_verdicts: dict[Any, tuple[str | None]] = {}


def run_apart(trial: Callable[[], str | None], *, key: Any) -> str | None:
    """Returns the result of a trial, or why it failed.

    Runs in a thread of its own, outside of any trace or running model. Results
    are cached by key, if that is hashable.
    """
    with contextlib.suppress(TypeError):
        if key in _verdicts:
            return _verdicts[key][0]
    # This option may be set for the current thread only.
    wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    def run() -> str | None:
        with jax.enable_x64(wide), jax.transfer_guard("allow"):
            return trial()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            found = pool.submit(run).result()
        except Exception as error:
            text = str(error).partition("\n")[0]
            found = f"which cannot be tried out alone ({text})"
    with contextlib.suppress(TypeError):
        _verdicts[key] = (found,)
    return found


def difference(
    theirs: Callable[[Any], dict[str, Any]],
    flaxs: Callable[[Any], dict[str, Any]],
    shape: tuple[int, ...],
    epsilon: float,
) -> str | None:
    """Returns the name of the first result that differs, or None.

    Args:
      theirs: x -> results by name.
      flaxs: the same for flax's layer.
      shape: shape of x.
      epsilon: epsilon of both layers.
    """
    rng = np.random.default_rng(0)
    # Skewed: for normal values, other formulas may give the same results.
    x = rng.exponential(2, shape).astype(np.float32)
    small = np.float32(max(epsilon, 1e-12) ** 0.5 / 2)
    got, want = jax.jit(theirs), jax.jit(flaxs)
    # As is, and so small that the results depend on epsilon.
    for scaled in (x + 1, x * small):
        a, b = got(scaled), want(scaled)
        for what in _ORDER:
            if not all(jax.tree.leaves(jax.tree.map(_agree, a[what], b[what]))):
                return what
    return None


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Returns random weights of an output, for a loss."""
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def _agree(a: Any, b: Any) -> bool:
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    bound = _TOLERANCE * max(float(abs(b).max(initial=0)), 1e-6)
    return a.shape == b.shape and bool((abs(a - b) <= bound).all())
