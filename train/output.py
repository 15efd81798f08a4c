"""Standard output that may be closed, full or unable to show a character."""

from __future__ import annotations

import os
import sys
import threading


def guard() -> None:
    """Makes printing safe: nothing that is shown ends a program.

    A descriptor that the program was started without is opened: else the first
    file that is written would get its number, and what libraries print.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    sys.unraisablehook = _of_main_thread


def _of_main_thread(unraisable: sys.UnraisableHookArgs) -> None:
    """Shows no traceback of a library's own threads.

    Where a disk is full or a file damaged, those of tensorstore print what they
    cannot hand to anybody any more, one by one, after the error was raised.
    """
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


def say(line: str) -> None:
    """Prints a line at once; goes on without output where it cannot."""
    try:
        print(line, flush=True)
    except OSError as error:
        lost(error)


def lost(error: OSError) -> None:
    """Says once that standard output is gone, and goes on without it."""
    drop()
    print(
        f"train: the output cannot be written ({error.strerror}); going on "
        "without it.",
        file=sys.stderr,
        flush=True,
    )


def drop() -> None:
    """Has all that is still to be shown go nowhere.

    Python would try again when it ends, and fail with a code of its own.
    """
    _to_nowhere(sys.stdout.fileno())  # not always 1; see ErrorLog.capture


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
