"""The frame of all experiments: claim, measure, verdict and picture."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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

    The docstring of the module that defines measure is a title, and paragraphs
    "Claim: ..." and "Published: ...", as in `Finding`.
    """

    # (settings, data) -> numbers; trains the arms.
    measure: Callable[[Settings, data.Data], dict[str, Any]]
    # numbers -> what was measured and whether the claim held.
    verdict: Callable[[dict[str, Any]], str]
    # (axes of all panels, numbers): draws.
    draw: Callable[[Any, dict[str, Any]], None]
    panels: tuple[str, ...]  # "title | x axis | y axis" of each
    shape: tuple[int, int]  # rows and columns of panels
    size: tuple[float, float]  # inches, without the caption
    grid: Mapping[str, Any] = {}  # further options of `Figure.subplots`

    @property
    def name(self) -> str:
        return self.measure.__module__.rpartition(".")[2]

    @property
    def claim(self) -> str:
        return self._paragraphs()["Claim"]

    def _paragraphs(self) -> dict[str, str]:
        title, *rest = sys.modules[self.measure.__module__].__doc__.split(
            "\n\n"
        )
        lines = (" ".join(text.split()) for text in rest)
        found = {
            head: text for head, _, text in (x.partition(": ") for x in lines)
        }
        return {"Title": title.rstrip("."), **found}

    def run(self, settings: Settings) -> Finding:
        """Measures on the data of settings."""
        numbers = self.measure(settings, data.load(settings))
        text = self._paragraphs()
        return Finding(
            self.name,
            *(text[head] for head in ("Title", "Claim", "Published")),
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
