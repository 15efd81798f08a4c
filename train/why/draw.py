"""What several pictures draw and say alike."""

from __future__ import annotations

from typing import Any

import numpy as np


def band(
    axes: Any,
    x: np.ndarray,
    values: np.ndarray,
    *,
    color: str,
    label: str | None = None,
    style: str = "-",
) -> None:
    """Draws the mean over seeds, in a band from the least to the most.

    Args:
      axes: of matplotlib.
      x: (T,).
      values: (S, T), one row a seed.
      color, label, style: of the line.
    """
    axes.plot(x, values.mean(0), style, color=color, label=label)
    axes.fill_between(
        x, values.min(0), values.max(0), color=color, alpha=0.2, lw=0
    )


def by_steps(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages over width steps; a rest is left out.

    Args:
      values: (S, T), one a step.
      width: steps that make one value.

    Returns:
      (the last step of each, counted from 1, and (S, T // width) averages).
    """
    seeds, steps = values.shape
    count = steps // width
    means = values[:, : count * width].reshape(seeds, count, width).mean(2)
    return width * np.arange(1, count + 1), means


def tally(holds: np.ndarray) -> str:
    """Says within a sentence on how many seeds a claim held."""
    count = f"{int(np.sum(holds))} of {np.size(holds)} seeds"
    return count if np.any(holds) else f"NOT reproduced, {count}"
