"""The arms of an experiment: the alternatives that it compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

# One colour has one meaning in every picture. Colour-blind eyes tell all of
# them apart (Okabe and Ito, 2008).
THEORY = "#333333"
THIRD = "#009E73"
FOURTH = "#CC79A7"


class Arm(NamedTuple):
    """One of the alternatives."""

    label: str | None  # in legends
    color: str
    style: str = "-"  # of its lines
    options: Mapping[str, Any] = {}  # of the function that trains it


WITHOUT = Arm("without", "#D55E00", options={"norm": False})
WITH = Arm("with batch norm", "#0072B2", options={"norm": True})
ARMS = {"without": WITHOUT, "with": WITH}


def each(
    arms: Mapping[str, Arm], measure: Callable, *args: Any, **options: Any
) -> dict[str, Any]:
    """measure(*args, **options, **arm.options) of each arm, as numpy."""
    return {
        name: jax.device_get(measure(*args, **options, **arm.options))
        for name, arm in arms.items()
    }
