"""Merges Moments in float64 and estimates the standard error."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxbn._passes import Moments


class MomentsSum:
    """Merged Moments in float64, and their variance over batches."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self._squares: Any = 0.0  # sum w^2
        self._first: dict[str, Any] = {}  # sum w^2 m
        self._second: dict[str, Any] = {}  # sum w^2 m^2
        self._origin: dict[str, Any] = {}
        self._batches = 0

    def add(self, part: Moments) -> None:
        part = _in_float64(part)
        values = {"mean": part.mean, "var": part.m2 / np.maximum(part.count, 1)}
        weight = np.square(part.count)
        if self.moments is None:
            self.moments = part
            # Relative to the first batch, so that equal batches have error 0.
            self._origin = values
            self._first = dict.fromkeys(values, 0.0)
            self._second = dict.fromkeys(values, 0.0)
        else:
            self.moments = _merge(self.moments, part)
        self._batches += 1
        self._squares = self._squares + weight
        for name, value in values.items():
            d = value - self._origin[name]
            self._first[name] = self._first[name] + weight * d
            self._second[name] = self._second[name] + weight * np.abs(d) ** 2

    def error(self, epsilon: float) -> float:
        if self.moments is None:
            return np.inf
        count, mean, m2 = self.moments
        total = np.maximum(count, 1)
        var = m2 / total + epsilon
        worst = 0.0
        for name, center, unit in (
            ("mean", mean, np.sqrt(var)),
            ("var", m2 / total, var),
        ):
            c = center - self._origin[name]
            spread = (
                self._second[name]
                - 2 * (np.conj(c) * self._first[name]).real
                + self._squares * np.abs(c) ** 2
            )
            factor = self._batches / (self._batches - 1)
            error = np.sqrt(factor * np.maximum(spread, 0)) / total / unit
            worst = max(worst, float(np.max(error, initial=0.0)))
        return worst


def _in_float64(part: Moments) -> Moments:
    """Casts to float64; count gets as many axes as the mean."""
    count, mean, m2 = map(np.asarray, part)
    # A layer in a scan has the scanned axis first.
    count = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    wide = np.promote_types(mean.dtype, np.float64)
    fields: Any = (
        count.astype(np.float64),
        mean.astype(wide),
        m2.astype(np.float64),
    )
    return Moments(*fields)


def _merge(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    gap = b.mean - a.mean
    between = a.count * share * np.abs(gap) ** 2
    return Moments(count, a.mean + share * gap, a.m2 + b.m2 + between)
