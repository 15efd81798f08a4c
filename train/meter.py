"""Accumulates metrics with a bounded number of steps in flight."""

from __future__ import annotations

import collections

import jax
import numpy as np

from train.state import Sums

# More steps in flight gain nothing, and simulated devices that run far ahead
# of each other can deadlock.
MAX_IN_FLIGHT = 8


class Meter:
    """Accumulates the sums of steps; blocks on the oldest if many are pending.

    Args:
      start: sums over earlier batches.
    """

    def __init__(self, start: tuple[float, ...] = (0.0,) * len(Sums._fields)):
        self._in_flight: collections.deque[Sums] = collections.deque()
        self._total = np.array(start, np.float64)

    @property
    def nonfinite(self) -> int:
        """Completed batches whose loss or gradient is not finite."""
        return int(Sums(*self._total).nonfinite)

    def add(self, sums: Sums) -> None:
        self._in_flight.append(sums)
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._collect_oldest()

    def _collect_oldest(self) -> None:
        self._total += np.array(jax.device_get(self._in_flight.popleft()))

    def sums(self) -> tuple[float, ...]:
        """Waits for all steps; returns the sums as Python floats."""
        while self._in_flight:
            self._collect_oldest()
        return tuple(map(float, self._total))

    def means(self) -> tuple[float, float]:
        """Waits for all steps; returns mean loss and accuracy."""
        total = Sums(*self.sums())
        if not total.count:
            return float("nan"), float("nan")
        return total.loss / total.count, total.correct / total.count
