"""Ends a process that makes no progress: others wait for it."""

from __future__ import annotations

import faulthandler
import tempfile
import threading
import time
from typing import TextIO

from train import RESUME
from train.exits import ErrorLog, exit_now

TICK = 1.0  # seconds


class _Watchdog:
    """Counts the seconds since the last sign of progress.

    They are counted one by one, so that those in which the process was
    suspended, by Ctrl-Z or a sleeping machine, do not count.
    """

    def __init__(self, limit: float, log: ErrorLog):
        self._limit, self._log = limit, log
        self._waited = 0.0
        self._doing = "starting"

    def beat(self, doing: str) -> None:
        self._waited, self._doing = 0.0, doing

    def watch(self) -> None:
        while self._waited < self._limit:
            time.sleep(TICK)
            self._waited += TICK
        with tempfile.TemporaryFile("w+") as file:
            path = self._log.write(_stacks(file))
        where = "" if path is None else f" Where it hangs is in {path}."
        exit_now(
            f"No progress for {self._limit:g} s, --stall_limit, while "
            f"{self._doing}: this process hangs, or waits for one that does. "
            "The same command on all hosts goes on from the last checkpoint."
            f"{where}",
            RESUME,
        )


def _stacks(file: TextIO) -> str:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()


_watchdog: _Watchdog | None = None


def start(limit: float, log: ErrorLog) -> None:
    """Begins to watch over this process.

    Args:
      limit: seconds without `beat` after which the process ends with exit code
        75; 0 lets it wait for ever.
      log: gets the stacks of all threads.
    """
    global _watchdog
    if limit > 0:
        _watchdog = _Watchdog(limit, log)
        threading.Thread(target=_watchdog.watch, daemon=True).start()


def beat(doing: str) -> None:
    """Says that there is progress, and what comes next."""
    if _watchdog is not None:
        _watchdog.beat(doing)
