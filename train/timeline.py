"""Where the time of a run goes, and batches made ready beside it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

# Batches that lie ready; more gain nothing once the device is the slower one.
AHEAD = 2


class Timeline:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts the time inside as that of name."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def shares(self) -> dict[str, float]:
        """Share of each name in the time of all of them."""
        total = sum(self.seconds.values()) or 1.0
        return {name: spent / total for name, spent in self.seconds.items()}

    def __str__(self) -> str:
        order = sorted(self.shares().items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {share:.1%}" for name, share in order)


def ready(batches: Iterable[_T], timeline: Timeline) -> Iterator[_T]:
    """Yields what a thread of its own reads ahead.

    The time that the caller waits for it counts as that of "data". An error in
    the thread is raised here.
    """
    lane: queue.Queue[tuple[bool, object]] = queue.Queue(AHEAD)
    given_up = threading.Event()

    def offer(item: tuple[bool, object]) -> bool:
        while not given_up.is_set():
            try:
                lane.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for batch in batches:
                if not offer((True, batch)):
                    return
            offer((False, None))
        except BaseException as error:  # handed to the caller
            offer((False, error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with timeline.of("data"):
                more, item = lane.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        given_up.set()
        thread.join()
