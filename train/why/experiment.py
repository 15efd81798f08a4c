"""The frame of all experiments: claim, measure, verdict and picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from train.why import data
from train.why.data import Settings


class Finding(NamedTuple):
    """What an experiment found."""

    name: str  # on the command line
    title: str  # a line above the picture
    claim: str  # what was published, with its source
    published: str  # the published figures
    measured: str  # what was measured here, in words made of the numbers
    numbers: dict[str, Any]  # numbers, strings, arrays, lists and dicts
    draw: Callable[[Figure], None]  # draws into an empty figure


class Experiment(NamedTuple):
    """A published claim and how it is measured again.

    The first four fields are those of `Finding`.
    """

    name: str
    title: str
    claim: str
    published: str
    # (settings, data) -> numbers; trains the arms.
    measure: Callable[[Settings, data.Data], dict[str, Any]]
    # numbers -> what was measured and whether the claim held.
    verdict: Callable[[dict[str, Any]], str]
    # (axes, numbers): draws into the axes of all panels.
    draw: Callable[[Sequence[Any], dict[str, Any]], None]
    panels: tuple[str, ...]  # "title | x axis | y axis" of each
    shape: tuple[int, int]  # rows and columns of panels
    size: tuple[float, float]  # inches, without the caption
    grid: Mapping[str, Any] = {}  # further options of `Figure.subplots`

    def run(self, settings: Settings) -> Finding:
        """Measures on the data of settings."""
        numbers = self.measure(settings, data.load(settings))
        return Finding(
            *self[:4],
            self.verdict(numbers),
            numbers,
            functools.partial(self.picture, numbers),
        )

    def picture(self, numbers: dict[str, Any], figure: Figure) -> None:
        """Draws and labels the panels in an empty figure."""
        figure.set_size_inches(*self.size)
        grid = figure.subplots(*self.shape, squeeze=False, **self.grid).ravel()
        self.draw(grid, numbers)
        for axes, panel in zip(grid, self.panels):
            title, xlabel, ylabel = panel.split(" | ")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if axes.get_legend_handles_labels()[0] and not axes.get_legend():
                axes.legend()


class _Words:
    """A value, or a tree of values, as `say` formats it."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, key: Any) -> _Words:
        return _Words(self.value[key])

    def __format__(self, spec: str) -> str:
        if isinstance(self.value, str):
            return self.value
        named = {"max": number, "tally": tally, "verdict": verdict}
        if spec in named:
            value = np.max(self.value) if spec == "max" else self.value
            return named[spec](value)
        if spec == "percent":
            return span(100 * np.asarray(self.value), ".0f")
        return span(self.value, spec or ".3g")


def say(template: str, **values: Any) -> str:
    """`str.format` for arrays with a value a seed.

    A number format, as in {x:.2f}, gives the range over seeds (`span`);
    {x:percent} gives that of 100 x; {x:max} the largest (`number`);
    {x:tally} and {x:verdict} count on how many seeds x is true.
    """
    return template.format(**{key: _Words(v) for key, v in values.items()})


def span(values: Any, spec: str = ".3g") -> str:
    """Words for the range of values: "0.98 to 1.02", or one number."""
    array = np.asarray(values, float)
    low, high = format(array.min(), spec), format(array.max(), spec)
    return low if low == high else f"{low} to {high}"


def number(value: Any) -> str:
    """Words for one number: three digits, an exponent where it is needed."""
    value = float(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.1e}"


def verdict(holds: Any) -> str:
    """Says on how many seeds a claim held: a sentence of its own."""
    holds = np.asarray(holds, bool)
    if not holds.any():
        return f"This did NOT reproduce here: 0 of {holds.size} seeds."
    only = "" if holds.all() else "only "
    return f"This held on {only}{holds.sum()} of {holds.size} seeds."


def tally(holds: Any) -> str:
    """Says within a sentence on how many seeds a claim held."""
    count = f"{int(np.sum(holds))} of {np.size(holds)} seeds"
    return count if np.any(holds) else f"NOT reproduced, {count}"
