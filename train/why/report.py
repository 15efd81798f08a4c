"""Writes findings: figures, a page with their captions, numbers as JSON."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence

import flax
import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from train.files import (
    atomic_write,
    nonfinite_to_none,
    write_json,
    write_text,
)
from train.why.data import Settings
from train.why.experiment import Finding

# Pages show figures at about 700 pixels: a width of 7 inches makes a point of
# a font 1.4 pixels.
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
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
        figure = Figure(layout="constrained")
        finding.draw(figure)
        figure.suptitle(
            finding.title, x=0.01, ha="left", fontsize=11, fontweight="bold"
        )
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


def write_page(
    findings: Sequence[Finding], folder: pathlib.Path, settings: Settings
) -> pathlib.Path:
    """Writes FOLDER/report.md, with all figures and their captions."""
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    parts = [
        "# Why does batch norm work?",
        f"Data: {settings.data}. Seeds: {', '.join(map(str, settings.seeds))}. "
        f"{time.strftime('%Y-%m-%d')}, {versions}.",
    ]
    for finding in findings:
        parts += [
            f"## {finding.title}",
            f"![{finding.title}]({finding.name}.png)",
            f"**Claim.** {finding.claim}",
            f"**Published.** {finding.published}",
            "**Measured.**",
            "\n".join(f"- {sentence}" for sentence in finding.measured),
        ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path
