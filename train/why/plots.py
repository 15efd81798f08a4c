"""What several figures draw: curves (S, T), one row per seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.why.methods import THEORY, Method


def band(axes: Any, x: Any, values: np.ndarray, method: Method) -> None:
    """Draws the mean over seeds, and shades from the lowest to the highest."""
    color = method.color
    axes.plot(x, values.mean(0), method.style, color=color, label=method.label)
    shade(axes, x, values.min(0), values.max(0), color=color)


def shade(
    axes: Any, x: Any, low: np.ndarray, high: np.ndarray, **options: Any
) -> None:
    """Fills the area between two curves."""
    axes.fill_between(x, low, high, **{"alpha": 0.2, "lw": 0, **options})


def lines(
    axes: Any, x: Any, values: np.ndarray, method: Method, **options: Any
) -> None:
    """Draws one line per seed, all under one label."""
    options = {"color": method.color, "alpha": 0.7, **options}
    handles = axes.plot(x, np.transpose(values), method.style, **options)
    handles[0].set_label(method.label)


def theory(
    axes: Any,
    x: Any,
    y: Any,
    label: str | None = None,
    style: str = "--",
    **options: Any,
) -> None:
    """Draws a prediction, above the measured curves."""
    options = {"color": THEORY, "zorder": 3, "lw": 1.3, **options}
    axes.plot(x, y, style, label=label, **options)


def level(axes: Any, y: float) -> None:
    """Draws a thin dotted line at a height."""
    axes.axhline(y, color=THEORY, lw=0.8, ls=":")


def note(axes: Any, x: float, y: float, text: str, color: str = THEORY) -> None:
    """Writes text at (x, y), from 0 to 1 in the axes."""
    place = {"transform": axes.transAxes, "fontsize": 8.5}
    axes.text(x, y, text, color=color, **place)


def name(axes: Any, x: float, y: float, method: Method) -> None:
    """Writes the name of a method beside its curve, instead of a legend."""
    note(axes, x, y, method.label, method.color)


def by_steps(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Averages over every `width` steps; an incomplete rest is left out.

    Returns:
      (the last step of each, counted from 1, and (S, T // width) averages).
    """
    seeds, steps = values.shape
    count = steps // width
    means = values[:, : count * width].reshape(seeds, count, width).mean(2)
    return width * np.arange(1, count + 1), means
