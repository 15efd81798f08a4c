"""SIGTERM as a wish to stop between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

import jax


class Interrupt:
    """Notes SIGTERM while it is a context, in place of ending at once.

    With several processes JAX itself catches the signal and agrees on a step
    with the others; there `asked` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and jax.process_count() == 1

    def __enter__(self) -> Self:
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.asked = True
