"""Writes a finding: a picture with a caption, and its numbers as JSON."""

from __future__ import annotations

import math
import pathlib
import textwrap
from typing import Any

import matplotlib
import numpy as np

from train.files import write_json
from train.why.data import Settings
from train.why.experiment import Finding

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_WIDTH = 9.0  # inches, unless the finding sets another
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

    Both appear in one piece. In the JSON an array is a list, and what is not
    finite is null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = finding._asdict()
    del record["draw"]
    if settings is not None:
        record["settings"] = settings._asdict()
    path = folder / f"{finding.name}.png"
    partial = folder / f"{finding.name}.partial.png"
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(_WIDTH, 4), layout="constrained")
        try:
            finding.draw(figure)
            _add_caption(figure, finding)
            figure.savefig(partial, dpi=150)
        finally:
            plt.close(figure)
    partial.replace(path)
    write_json(path.with_suffix(".json"), _plain(record))
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
    font = {"fontsize": 13, "fontweight": "bold"}
    y = 1 - 0.13 / total
    figure.text(0.5, y, finding.title, ha="center", va="top", **font)
    y = below - 0.1
    for head, lines in blocks.items():
        font = {"va": "top", "fontsize": 9, "linespacing": 1.32}
        figure.text(0.18 / width, y / total, head, fontweight="bold", **font)
        figure.text(1.3 / width, y / total, "\n".join(lines), **font)
        y -= _LINE * len(lines)


def _plain(value: Any) -> Any:
    """value in the types of JSON; what is not finite is None."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, str) or value is None:
        return value
    value = np.asarray(value).tolist()
    if isinstance(value, list):
        return _plain(value)
    return value if math.isfinite(value) else None
