"""Reads batches ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from train.timing import Timer

_T = TypeVar("_T")

# Batches to prefetch; once the device is the bottleneck, more gain nothing.
PREFETCH = 2


def prefetch(batches: Iterable[_T], timer: Timer) -> Iterator[_T]:
    """Yields batches that a background thread reads ahead.

    Time spent waiting for a batch is counted as "data". An error in the thread
    is raised in the caller.
    """
    buffer: queue.Queue[tuple[bool, object]] = queue.Queue(PREFETCH)
    closed = threading.Event()

    def put(item: tuple[bool, object]) -> bool:
        while not closed.is_set():
            try:
                buffer.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for batch in batches:
                if not put((True, batch)):
                    return
            put((False, None))
        except BaseException as error:  # raised in the caller
            put((False, error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with timer.measure("data"):
                more, item = buffer.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        closed.set()
        thread.join()
