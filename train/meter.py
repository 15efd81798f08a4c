"""Sums of steps, with only a few steps in flight."""

from __future__ import annotations

import collections

import jax
import numpy as np

from train.step import Sums

# More steps in flight than this gain nothing, and simulated devices that run
# far ahead of each other can wait for ever.
MAX_IN_FLIGHT = 8


class Meter:
    """Adds up the sums of steps; waits for the oldest of many in flight.

    Args:
      start: sums over batches before.
    """

    def __init__(self, start: tuple[float, ...] = (0.0,) * len(Sums._fields)):
        self._in_flight: collections.deque[Sums] = collections.deque()
        self._total = np.array(start, np.float64)

    @property
    def nonfinite(self) -> int:
        """Batches without a finite loss and gradient, of those landed."""
        return int(Sums(*self._total).nonfinite)

    def add(self, sums: Sums) -> None:
        self._in_flight.append(sums)
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        self._total += np.array(jax.device_get(self._in_flight.popleft()))

    def sums(self) -> tuple[float, ...]:
        """Waits for all steps; returns the sums as plain numbers."""
        while self._in_flight:
            self._land()
        return tuple(map(float, self._total))

    def means(self) -> tuple[float, float]:
        """Waits for all steps; returns mean loss and accuracy."""
        total = Sums(*self.sums())
        if not total.count:
            return float("nan"), float("nan")
        return total.loss / total.count, total.correct / total.count
