"""The frame of all experiments: arms and seeds, claim, verdict and picture."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

from train.why import data
from train.why.arms import Arm
from train.why.data import Setting, Settings


def each(
    arms: Mapping[str, Arm], measure: Callable, *args: Any, **options: Any
) -> dict[str, Any]:
    """measure(*args, **options, **arm.options) of each arm, as numpy."""
    return {
        name: jax.device_get(measure(*args, **options, **arm.options))
        for name, arm in arms.items()
    }


def per_seed(measure: Callable) -> Callable:
    """Compiles measure(run, *shared, **static) for all seeds.

    run is a Setting, of which measure sees the key and the indices of one seed,
    or a tree with a leading axis of seeds; results are stacked. Static are the
    arguments that are keyword-only.
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
        return self.paragraphs()["Claim"]

    def paragraphs(self) -> dict[str, str]:
        """Title, Claim and Published, a line each."""
        text = sys.modules[self.measure.__module__].__doc__
        lines = [" ".join(part.split()) for part in text.split("\n\n")]
        heads, _, texts = zip(*(line.partition(": ") for line in lines))
        return {"Title": lines[0].rstrip("."), **dict(zip(heads, texts))}

    def run(self, settings: Settings) -> Finding:
        """Measures on the data of settings."""
        numbers = self.measure(settings, data.load_data(settings))
        text = self.paragraphs()
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
