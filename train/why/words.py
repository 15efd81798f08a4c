"""Sentences made of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np


def say(template: str, **values: Any) -> str:
    """`str.format` for arrays with a value a seed.

    A number format, as in {x:.2f}, gives the range over seeds (`span`);
    {x:percent} gives that of 100 x; {x:max} the largest (`number`);
    {x:tally} and {x:verdict} count on how many seeds x is true.
    """
    return template.format(**{key: _Words(v) for key, v in values.items()})


class _Words:
    """A value, or a tree of values, as `say` formats it."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, key: Any) -> _Words:
        return _Words(self.value[key])

    def __format__(self, spec: str) -> str:
        if isinstance(self.value, str):
            return self.value
        if spec in _FORMATS:
            return _FORMATS[spec](np.asarray(self.value))
        return span(self.value, spec or ".3g")


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


def tally(holds: Any) -> str:
    """Says within a sentence on how many seeds a claim held."""
    count = f"{int(np.sum(holds))} of {np.size(holds)} seeds"
    return count if np.any(holds) else f"NOT reproduced, {count}"


_FORMATS = {
    "percent": lambda x: span(100 * x, ".0f"),
    "max": lambda x: number(x.max()),
    "tally": tally,
    "verdict": verdict,
}
