"""The arms of an experiment: the alternatives that it compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbn import batch_norm

# One colour has one meaning in every picture. Colour-blind eyes tell all of
# them apart (Okabe and Ito, 2008).
THEORY = "#333333"
THIRD = "#009E73"
FOURTH = "#CC79A7"


class Arm(NamedTuple):
    """One of the alternatives that an experiment compares."""

    label: str | None  # in legends
    color: str
    style: str = "-"  # of its lines
    options: Mapping[str, Any] = {}  # of the function that measures it


WITHOUT = Arm("without", "#D55E00", options={"norm": None})
WITH = Arm("with batch norm", "#0072B2", options={"norm": batch_norm})
ARMS = {"without": WITHOUT, "with": WITH}
