"""What an experiment found: a picture with a caption, and its numbers."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from train.files import write_json

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# The same colour for the same thing in every picture. All are told apart by
# colour-blind eyes (Okabe and Ito, 2008).
WITH = "#0072B2"
WITHOUT = "#D55E00"
THEORY = "#333333"
THIRD = "#009E73"
FOURTH = "#CC79A7"
WITH_LABEL = "with batch norm"
WITHOUT_LABEL = "without"
SIDES = {"without": (WITHOUT, WITHOUT_LABEL), "with": (WITH, WITH_LABEL)}

_WIDTH = 9.0  # inches, unless draw sets another
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


class Settings(NamedTuple):
    """What all experiments are told.

    data: "digits" or "cifar10".
    data_dir: where prepared CIFAR lies; None looks where TFDS does.
    seeds: one repetition each.
    quick: a smaller form, for tests.
    """

    data: str = "digits"
    data_dir: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False


class Finding(NamedTuple):
    """What an experiment found.

    name: its name on the command line.
    title: a line above the picture.
    claim: what was published, with its source.
    published: the published figures.
    measured: what was measured here, in words made of the numbers.
    numbers: of the picture; numbers, strings, arrays, lists and dicts.
    draw: draws the axes into an empty figure; may set its size.
    """

    name: str
    title: str
    claim: str
    published: str
    measured: str
    numbers: dict[str, Any]
    draw: Callable[[Figure], None]


def write(
    finding: Finding,
    folder: pathlib.Path,
    *,
    settings: Settings | None = None,
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
            _frame(figure, finding)
            figure.savefig(partial, dpi=150)
        finally:
            plt.close(figure)
    partial.replace(path)
    write_json(path.with_suffix(".json"), _plain(record))
    return path


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


def _frame(figure: Figure, finding: Finding) -> None:
    """Adds the title above and the caption below; the figure grows by both."""
    width, height = figure.get_size_inches()
    columns = int((width - 1.45) * 14.4)
    blocks = [
        (head, textwrap.wrap(text[:1].upper() + text[1:], columns))
        for head, text in (
            ("Claim", finding.claim),
            ("Published", finding.published),
            ("Measured", finding.measured),
        )
    ]
    count = sum(len(lines) for _, lines in blocks)
    below, above = _LINE * (count + 1.2), 0.42
    total = height + below + above
    figure.set_size_inches(width, total)
    figure.get_layout_engine().set(
        rect=(0.01, below / total, 0.98, height / total)
    )
    figure.text(
        0.5,
        1 - 0.13 / total,
        finding.title,
        ha="center",
        va="top",
        fontsize=13,
        fontweight="bold",
    )
    y = below - 0.1
    for head, lines in blocks:
        kept = {"va": "top", "fontsize": 9, "linespacing": 1.32}
        figure.text(0.18 / width, y / total, head, fontweight="bold", **kept)
        figure.text(1.3 / width, y / total, "\n".join(lines), **kept)
        y -= _LINE * len(lines)


def _plain(value: Any) -> Any:
    """What JSON can say."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    array = np.asarray(value)
    if array.ndim:
        return [_plain(entry) for entry in array]
    if array.dtype == bool:
        return bool(array)
    if np.issubdtype(array.dtype, np.integer):
        return int(array)
    number = float(array)
    return number if np.isfinite(number) else None
