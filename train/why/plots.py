"""Lines that several pictures draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from train.why.arms import THEORY, Arm


def band(axes: Axes, x: np.ndarray, values: np.ndarray, arm: Arm) -> None:
    """Draws the mean over seeds, in a band from the least to the most.

    Args:
      axes: of matplotlib.
      x: (T,).
      values: (S, T), a row a seed.
      arm: label, color and style.
    """
    x, values = np.asarray(x), np.asarray(values)
    axes.plot(x, values.mean(0), arm.style, color=arm.color, label=arm.label)
    low, high = values.min(0), values.max(0)
    axes.fill_between(x, low, high, color=arm.color, alpha=0.2, lw=0)


def lines(
    axes: Axes, x: np.ndarray, values: np.ndarray, arm: Arm, **options: Any
) -> None:
    """Draws a line a seed, all of them under one label; as `band`."""
    options = {"color": arm.color, "alpha": 0.7, **options}
    handles = axes.plot(x, np.transpose(values), arm.style, **options)
    handles[0].set_label(arm.label)


def theory(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    label: str | None,
    style: str = "--",
) -> None:
    """Draws what theory expects, above the measured lines."""
    axes.plot(x, y, style, color=THEORY, zorder=3, label=label)


def level(axes: Axes, y: float) -> None:
    """Draws a thin dotted line at a height."""
    axes.axhline(y, color=THEORY, lw=0.8, ls=":")


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
