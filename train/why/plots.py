"""Lines that several pictures draw: values (S, T), a row a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.why.arms import THEORY, Arm


def band(axes: Any, x: np.ndarray, values: np.ndarray, arm: Arm) -> None:
    """Draws the mean over seeds, in a band from the least to the most."""
    axes.plot(x, values.mean(0), arm.style, color=arm.color, label=arm.label)
    shade(axes, x, values.min(0), values.max(0), color=arm.color)


def shade(
    axes: Any, x: np.ndarray, low: np.ndarray, high: np.ndarray, **options: Any
) -> None:
    """Fills the area between two lines."""
    axes.fill_between(x, low, high, **{"alpha": 0.2, "lw": 0, **options})


def lines(
    axes: Any, x: np.ndarray, values: np.ndarray, arm: Arm, **options: Any
) -> None:
    """Draws a line a seed, all of them under one label."""
    options = {"color": arm.color, "alpha": 0.7, **options}
    handles = axes.plot(x, np.transpose(values), arm.style, **options)
    handles[0].set_label(arm.label)


def theory(
    axes: Any, x: np.ndarray, y: np.ndarray, label: str, style: str = "--"
) -> None:
    """Draws what theory expects, above the measured lines."""
    axes.plot(x, y, style, color=THEORY, zorder=3, label=label)


def level(axes: Any, y: float) -> None:
    """Draws a thin dotted line at a height."""
    axes.axhline(y, color=THEORY, lw=0.8, ls=":")


def by_steps(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages over width steps; a rest is left out.

    Returns:
      (the last step of each, counted from 1, and (S, T // width) averages).
    """
    seeds, steps = values.shape
    count = steps // width
    means = values[:, : count * width].reshape(seeds, count, width).mean(2)
    return width * np.arange(1, count + 1), means
