"""What all experiments share: methods, seeds, a claim, a figure."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from train.why import data
from train.why.data import Setting, Settings
from train.why.methods import Method


def each(
    methods: Mapping[str, Method], measure: Callable, *args: Any, **options: Any
) -> dict[str, Any]:
    """measure(*args, **options, **method.options) of each, as numpy."""
    return {
        name: jax.device_get(measure(*args, **options, **method.options))
        for name, method in methods.items()
    }


def per_seed(measure: Callable) -> Callable:
    """Compiles measure(run, *shared, **static) for all seeds.

    run is a Setting, of which measure sees the key and the indices of one seed,
    or a tree with a leading axis of seeds; results are stacked. Keyword-only
    arguments are static.
    """

    def every(run: Any, *shared: Any, **static: Any) -> Any:
        one = functools.partial(measure, **static)
        own = Setting(0, 0, None, None) if isinstance(run, Setting) else 0
        return jax.vmap(one, (own, *(None for _ in shared)))(run, *shared)

    static = inspect.getfullargspec(measure).kwonlyargs
    return jax.jit(every, static_argnames=static)


class Finding(NamedTuple):
    """What an experiment found."""

    name: str  # on the command line
    title: str
    claim: str  # what was published, with its source
    published: str  # the published figures
    measured: list[str]  # what was measured here, in sentences
    numbers: dict[str, Any]  # numbers, strings, arrays, lists and dicts
    draw: Callable[[Figure], None]  # draws into an empty figure


class Experiment(NamedTuple):
    """A published claim and how it is tested.

    The docstring of the module that defines measure is a title, and paragraphs
    "Claim: ..." and "Published: ...", as in `Finding`.
    """

    # (settings, data) -> numbers; trains with all methods.
    measure: Callable[[Settings, data.Data], dict[str, Any]]
    # numbers -> sentences: what was measured, and whether the claim held.
    verdict: Callable[[dict[str, Any]], list[str]]
    # (axes of all panels, numbers): draws.
    draw: Callable[[Any, dict[str, Any]], None]
    panels: tuple[str, ...]  # "title | x axis | y axis" of each
    shape: tuple[int, int]  # rows and columns of panels
    height: float  # inches; the width is 7
    grid: Mapping[str, Any] = {}  # further options of `Figure.subplots`

    @property
    def name(self) -> str:
        return self.measure.__module__.rpartition(".")[2]

    @property
    def claim(self) -> str:
        return self.paragraphs()["claim"]

    def paragraphs(self) -> dict[str, str]:
        """title, claim and published, each on one line."""
        text = sys.modules[self.measure.__module__].__doc__
        title, claim, published = (
            " ".join(part.split()) for part in text.split("\n\n")[:3]
        )
        return {
            "title": title.removesuffix("."),
            "claim": claim.removeprefix("Claim: "),
            "published": published.removeprefix("Published: "),
        }

    def run(self, settings: Settings) -> Finding:
        """Measures on the data of settings."""
        numbers = self.measure(settings, data.load_data(settings))
        return Finding(
            name=self.name,
            **self.paragraphs(),
            measured=self.verdict(numbers),
            numbers=numbers,
            draw=functools.partial(self.picture, numbers),
        )

    def picture(self, numbers: dict[str, Any], figure: Figure) -> None:
        """Draws and labels the panels in an empty figure."""
        figure.set_size_inches(7, self.height)
        grid = figure.subplots(*self.shape, squeeze=False, **self.grid).ravel()
        self.draw(grid, numbers)
        for axes, panel in zip(grid, self.panels):
            title, xlabel, ylabel = panel.split(" | ")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
