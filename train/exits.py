"""Exits with a one-line error, an exit code, and a log with the details."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from train import RESUME, clock

_ending = threading.Lock()  # never released by the thread that exits


def exit_now(
    message: str,
    code: int,
    *,
    program: str = "train",
    last: Callable[[], Any] | None = None,
) -> NoReturn:
    """Prints a line and exits immediately, from any thread.

    A clean exit could block: on other processes, in a collective that this one
    never joins, or on threads waiting for a file system.

    Args:
      message: the line to print.
      code: the exit code.
      program: prefix of the line.
      last: called after printing; exceptions are ignored.
    """
    _ending.acquire()
    # Flushing blocks while a pager does not read.
    with contextlib.suppress(
        RuntimeError
    ):  # no new thread at interpreter shutdown
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(1.0)
    with contextlib.suppress(OSError, ValueError):
        print(f"{program}: {message}", file=sys.stderr, flush=True)
    if last is not None:
        with contextlib.suppress(Exception):
            last()
    os._exit(code)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        clock.end_line()
        sys.stdout.flush()


class ErrorLog:
    """Log file for the details of an error; the user sees one line.

    Args:
      process: index of this process; None with a single process.
    """

    def __init__(self, process: int | None = None):
        self._name = "error.log" if process is None else f"error-{process}.log"
        self._folder: pathlib.Path | None = None
        self._captured: io.BufferedRandom | None = None
        self._finished: int | None = None
        self._connecting = True
        self._handler: Any = None  # kept alive for ctypes

    def use(self, workdir: pathlib.Path) -> None:
        """Logs to this directory once it exists, instead of a temporary one."""
        self._folder = workdir

    def write(self, text: str) -> pathlib.Path | None:
        """Appends text and the captured output of libraries to the log.

        Returns:
          Path of the log, or None if none could be written.
        """
        import tempfile  # imported late to keep `listen` early

        text = f"{text.rstrip()}\n\n{self._printed()}".rstrip() + "\n"
        temporary = pathlib.Path(tempfile.gettempdir())
        own = temporary / f"train-{os.getpid()}-{self._name}"
        found = self._folder is not None and self._folder.is_dir()
        for path in (self._folder / self._name, own) if found else (own,):
            # Follow no symbolic link, and do not block on a pipe.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK
            with contextlib.suppress(OSError):
                with open(os.open(path, flags, 0o644), "a") as file:
                    file.write(text)
                return path
        return None

    def capture(self) -> None:
        """Captures what libraries print to standard output and error.

        They log connections there, and when a process dies, the libraries of
        the others print a hundred lines and abort. sys.stdout and sys.stderr
        still reach the user.
        """
        import tempfile

        # Stays open until the process exits.
        self._captured = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout = _redirect(sys.stdout, 1, self._captured.fileno())
        sys.stderr = _redirect(sys.stderr, 2, self._captured.fileno())
        threading.excepthook = self._thread_failed
        self._on_abort()

    def connected(self) -> None:
        """From now on an abort means that another process was lost."""
        self._connecting = False

    def finish(self, code: int) -> None:
        """Sets the exit code, also of an abort within JAX's shutdown."""
        self._finished = code

    def lost(self, error: str) -> NoReturn:
        """Exits because another process was lost."""
        path = self.write(error)
        exit_now(
            "Lost the connection to another process, which died or exited; see "
            "its output for the reason. Rerun the same command on all hosts to "
            f"resume from the last checkpoint.{_see_file(path)}",
            RESUME,
        )

    def unexpected(self, error: BaseException) -> NoReturn:
        """Exits with an unexpected error."""
        text = "".join(traceback.format_exception(error))
        path = self.write(text)
        if path is None:
            exit_now(text, 1)
        words = " ".join(str(error).split())
        short = words[:200] + ("..." if len(words) > 200 else "")
        exit_now(
            f"Unexpected {type(error).__name__}: {short.rstrip('.')}."
            f"{_see_file(path)}",
            1,
        )

    def _thread_failed(self, given: threading.ExceptHookArgs) -> None:
        text = "".join(
            traceback.format_exception(
                given.exc_type, given.exc_value, given.exc_traceback
            )
        )
        if self._captured is not None:
            self._captured.write(text.encode(errors="replace"))
            self._captured.flush()

    def _printed(self) -> str:
        if self._captured is None:
            return ""
        size = os.fstat(self._captured.fileno()).st_size
        start = max(0, size - 100_000)
        return os.pread(self._captured.fileno(), size - start, start).decode(
            errors="replace"
        )

    def _on_abort(self) -> None:
        """Handles SIGABRT: JAX aborts, in a thread, if it loses a process.

        Python's signal handlers run in the main thread, so never.
        """

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def handler(_: int) -> None:
            self._aborted()

        self._handler = handler
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))

    def _aborted(self) -> NoReturn:
        if self._finished is not None:
            os._exit(self._finished)
        printed = self._printed()
        if "distributed service detected fatal errors" not in printed:
            path = self.write("A library aborted the process.")
            exit_now(f"A library aborted the process.{_see_file(path)}", 1)
        if self._connecting:
            path = self.write("The processes did not connect.")
            exit_now(
                "The processes did not connect. Start all of them within a "
                "minute, with the same --coordinator, which all can reach, the "
                "same --num_processes, and distinct --process_id."
                f"{_see_file(path)}",
                1,
            )
        self.lost("JAX aborted the process.")


def _redirect(stream: TextIO, number: int, captured: int) -> TextIO:
    """Moves a stream to a new descriptor; libraries keep the old one."""
    stream.flush()
    own = os.dup(number)
    os.dup2(captured, number)
    return open(
        own,
        "w",
        buffering=1,
        encoding=stream.encoding,
        errors=stream.errors,
    )


def _see_file(path: pathlib.Path | None) -> str:
    return "" if path is None else f" The original error is in {path}."
