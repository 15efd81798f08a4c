"""Exits if a process stalls, since the others wait for it."""

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
    """Counts the seconds since the last progress.

    Counts in ticks, to exclude time while the process was suspended by Ctrl-Z
    or the machine was asleep.
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
        where = "" if path is None else f" Stack traces are in {path}."
        exit_now(
            f"No progress for {self._limit:g} s, --stall_limit, while "
            f"{self._doing}: this process or one that it waits for hangs. "
            "Rerun the same command on all hosts to resume from the last "
            f"checkpoint.{where}",
            RESUME,
        )


def _stacks(file: TextIO) -> str:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()


_watchdog: _Watchdog | None = None


def start(limit: float, log: ErrorLog) -> None:
    """Starts the watchdog of this process.

    Args:
      limit: seconds without `beat` until the process exits with code 75; 0
        disables the watchdog.
      log: receives the stack traces of all threads.
    """
    global _watchdog
    if limit > 0:
        _watchdog = _Watchdog(limit, log)
        threading.Thread(target=_watchdog.watch, daemon=True).start()


def beat(doing: str) -> None:
    """Reports progress, and what the process does next."""
    if _watchdog is not None:
        _watchdog.beat(doing)
