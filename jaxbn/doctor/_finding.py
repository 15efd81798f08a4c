"""A problem of a layer."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """A problem of a layer; findings that differ only in figures are merged.

    Attributes:
      cause: the problem, with a {} for each figure.
      remedy: what to do.
      figures: pairs of a number and its format spec, such as ".0%".
    """

    cause: str
    remedy: str
    figures: tuple[tuple[float, str], ...] = ()
