"""How the wall time of a run is spent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Timer:
    """Accumulates seconds by activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the context to name."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def spent(self, name: str) -> float:
        """Returns the seconds spent on an activity so far."""
        return self.seconds.get(name, 0.0)

    def shares(self) -> dict[str, float]:
        """Returns the fraction of the total time spent on each activity."""
        total = sum(self.seconds.values()) or 1.0
        return {name: spent / total for name, spent in self.seconds.items()}

    def __str__(self) -> str:
        order = sorted(self.shares().items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {share:.1%}" for name, share in order)
