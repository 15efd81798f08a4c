"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NUM_RECENT = 2  # a crash while writing the newest leaves the previous one


class RetentionPolicy:
    """Keeps the most recent checkpoints and the one with the best accuracy.

    Args:
      accuracy: maps steps to test accuracy, where it was measured.
    """

    def __init__(self, accuracy: dict[int, float]):
        self._accuracy = accuracy

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        keep = {*sorted(steps)[-NUM_RECENT:]}
        tested = [step for step in sorted(steps) if step in self._accuracy]
        if tested:
            keep.add(max(reversed(tested), key=self._accuracy.__getitem__))
        return [step in keep for step in steps]
