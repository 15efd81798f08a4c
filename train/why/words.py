"""Numbers in sentences: most have one value per seed."""

from __future__ import annotations

from typing import Any

import numpy as np


def span(values: Any, spec: str = ".3g") -> str:
    """Returns the range of values, such as "0.98 to 1.02", or one number."""
    array = np.asarray(values, float)
    low, high = format(array.min(), spec), format(array.max(), spec)
    return low if low == high else f"{low} to {high}"


def percent(values: Any) -> str:
    """Returns the range of 100 values, such as "57 to 59%"."""
    return f"{span(100 * np.asarray(values), '.0f')}%"


def largest(values: Any) -> str:
    """Returns the largest value with two or three digits."""
    value = float(np.max(values))
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-")


def held(claim: str, holds: Any) -> str:
    """Returns a sentence on how many seeds a claim held for."""
    holds = np.asarray(holds, bool)
    if not holds.any():
        return f"{claim}: not reproduced (0 of {holds.size} seeds)."
    only = "" if holds.all() else "only "
    return f"{claim}: held for {only}{holds.sum()} of {holds.size} seeds."
