"""Writes a finding: a picture with a caption, and its numbers as JSON."""

from __future__ import annotations

import pathlib
import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from train.files import atomic_write, nonfinite_to_none, write_json
from train.why.data import Settings
from train.why.experiment import Finding

_LINE = 0.185  # inches that a line of the caption takes
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def write(
    finding: Finding, folder: pathlib.Path, *, settings: Settings | None = None
) -> pathlib.Path:
    """Writes FOLDER/NAME.png and FOLDER/NAME.json; returns the former.

    In the JSON an array is a list, and what is not finite is null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{finding.name}.png"
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        finding.draw(figure)
        _add_caption(figure, finding)
        with atomic_write(path) as file:
            figure.savefig(file, dpi=150)
    record = finding._asdict()
    del record["draw"]
    if settings is not None:
        record["settings"] = settings._asdict()
    plain = nonfinite_to_none(
        record, default=lambda array: np.asarray(array).tolist()
    )
    write_json(path.with_suffix(".json"), plain)
    return path


def _add_caption(figure: Figure, finding: Finding) -> None:
    """Adds the title above and the caption below; the figure grows by both."""
    width, height = figure.get_size_inches()
    columns = int((width - 1.45) * 14.4)
    blocks = {
        head: textwrap.wrap(text[:1].upper() + text[1:], columns)
        for head, text in (
            ("Claim", finding.claim),
            ("Published", finding.published),
            ("Measured", finding.measured),
        )
    }
    below = _LINE * (sum(map(len, blocks.values())) + 1.2)
    total = height + below + 0.42
    figure.set_size_inches(width, total)
    figure.get_layout_engine().set(
        rect=(0.01, below / total, 0.98, height / total)
    )
    font = {"ha": "center", "va": "top", "fontsize": 13, "fontweight": "bold"}
    figure.text(0.5, 1 - 0.13 / total, finding.title, **font)
    y = below - 0.1
    for head, lines in blocks.items():
        font = {"va": "top", "fontsize": 9, "linespacing": 1.32}
        figure.text(0.18 / width, y / total, head, fontweight="bold", **font)
        figure.text(1.3 / width, y / total, "\n".join(lines), **font)
        y -= _LINE * len(lines)
