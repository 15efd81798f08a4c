"""Accumulates metrics with a bounded number of steps in flight."""

from __future__ import annotations

import collections
from collections.abc import Callable

import jax
import numpy as np

from train.state import NO_SUMS, Sums

# More steps in flight gain nothing, and simulated devices that run far ahead
# of each other can deadlock.
MAX_IN_FLIGHT = 8


class Meter:
    """Accumulates the sums of steps; blocks on the oldest if many are pending.

    Args:
      start: sums over earlier batches.
      step: number of steps before.
      fetched: called with the step and sums of each dispatch, in order, once
        they are on the host; causes no transfer or wait of its own.
    """

    def __init__(
        self,
        start: tuple[float, ...] = NO_SUMS,
        *,
        step: int = 0,
        fetched: Callable[[int, Sums], object] = lambda step, sums: None,
    ):
        self._in_flight: collections.deque[tuple[int, Sums]] = (
            collections.deque()
        )
        self._step, self._fetched = step, fetched
        self._total = np.array(start, np.float64)

    @property
    def nonfinite(self) -> int:
        """Completed batches whose loss or gradient is not finite."""
        return int(Sums(*self._total).nonfinite)

    def add(self, sums: Sums, steps: int = 1) -> None:
        """Adds the sums over the next steps."""
        self._in_flight.append((steps, sums))
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._collect_oldest()

    def _collect_oldest(self) -> None:
        steps, sums = self._in_flight.popleft()
        values = jax.device_get(sums)
        self._total += np.array(values)
        self._step += steps
        self._fetched(self._step, values)

    def sums(self) -> tuple[float, ...]:
        """Waits for all steps; returns the sums as Python floats."""
        while self._in_flight:
            self._collect_oldest()
        return tuple(map(float, self._total))

    def means(self) -> tuple[float, float]:
        """Waits for all steps; returns mean loss and accuracy.

        They are NaN if there are no examples: all batches were skipped.
        """
        total = Sums(*self.sums())
        if not total.count:
            return float("nan"), float("nan")
        return total.loss / total.count, total.correct / total.count
