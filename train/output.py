"""Robust printing: standard output may be closed, full or not UTF-8."""

from __future__ import annotations

import os
import sys
import textwrap
import threading

WIDTH = 80  # columns of a printed line


def guard() -> None:
    """Keeps printing from ending the program.

    Opens standard descriptors that are closed: otherwise the next file opened
    would get the number, and the output of libraries.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _redirect_to_devnull(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    sys.unraisablehook = _main_thread_only


def _main_thread_only(unraisable: sys.UnraisableHookArgs) -> None:
    """Hides unraisable exceptions of background threads.

    If a disk is full or a file is damaged, tensorstore's threads report errors
    one by one after the first was raised.
    """
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


def wrap(text: str) -> str:
    """Wraps the lines of a text at WIDTH columns; paths are not broken."""

    def wrapped(line: str) -> str:
        if len(line) <= WIDTH:
            return line
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        return textwrap.fill(
            line,
            WIDTH,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    return "\n".join(map(wrapped, text.split("\n")))


def say(text: str) -> None:
    """Prints and flushes wrapped lines; output errors are reported once."""
    try:
        print(wrap(text), flush=True)
    except OSError as error:
        lost(error)


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # closed
        return False


def lost(error: OSError) -> None:
    """Reports that standard output is lost, and discards further output."""
    drop()
    print(
        f"train: cannot write to standard output ({error.strerror}); "
        "continuing without it.",
        file=sys.stderr,
        flush=True,
    )


def drop() -> None:
    """Discards further output.

    Otherwise Python flushes at exit, and fails with its own exit code.
    """
    _redirect_to_devnull(
        sys.stdout.fileno()
    )  # not always 1; see ErrorLog.capture


def _redirect_to_devnull(number: int) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    if devnull != number:
        os.dup2(devnull, number)
        os.close(devnull)
