"""The methods that an experiment compares, and their colors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbn import batch_norm

# A color has one meaning in all figures. Readers who are color-blind can tell
# them apart (Okabe and Ito, 2008).
THEORY = "#333333"
THIRD = "#009E73"
FOURTH = "#CC79A7"


class Method(NamedTuple):
    """One of the methods that an experiment compares."""

    label: str | None  # in figures
    color: str
    style: str = "-"  # of its lines
    options: Mapping[str, Any] = {}  # of the function that measures it


WITHOUT = Method("no batch norm", "#D55E00", options={"norm": None})
WITH = Method("batch norm", "#0072B2", options={"norm": batch_norm})
METHODS = {"without": WITHOUT, "with": WITH}
