"""The end of a process: one line, one exit code, and a file with the rest."""

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

from train import RESUME

_ending = threading.Lock()  # held for good by the thread that ends the process


def exit_now(
    message: str,
    code: int,
    *,
    program: str = "train",
    last: Callable[[], Any] | None = None,
) -> NoReturn:
    """Prints a line and ends the process at once, from any thread.

    A clean exit would wait: for other processes, in a collective that this one
    will never join, and for threads that wait for a file system.

    Args:
      message: the line.
      code: that the process ends with.
      program: that the line begins with.
      last: is called once the line is out; what it raises is dropped.
    """
    _ending.acquire()
    # A reader that takes nothing, such as a pager, would be waited for.
    with contextlib.suppress(RuntimeError):  # no thread while Python ends
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
        sys.stdout.flush()


class ErrorLog:
    """Where the details of an error go, so that the user gets one line.

    Args:
      process: index of this process; None where there is only one.
    """

    def __init__(self, process: int | None = None):
        self._name = "error.log" if process is None else f"error-{process}.log"
        self._folder: pathlib.Path | None = None
        self._captured: io.BufferedRandom | None = None
        self._finished: int | None = None
        self._connecting = True
        self._handler: Any = None  # ctypes calls it as long as it is kept

    def use(self, workdir: pathlib.Path) -> None:
        """Writes to this folder, once it exists, and not to a temporary one."""
        self._folder = workdir

    def write(self, text: str) -> pathlib.Path | None:
        """Appends text, and what libraries have printed, to the file.

        Returns:
          The file, or None where none can be written.
        """
        import tempfile  # here: what is imported first delays `listen`

        text = f"{text.rstrip()}\n\n{self._printed()}".rstrip() + "\n"
        temporary = pathlib.Path(tempfile.gettempdir())
        own = temporary / f"train-{os.getpid()}-{self._name}"
        found = self._folder is not None and self._folder.is_dir()
        for path in (self._folder / self._name, own) if found else (own,):
            # Not through a link that somebody has laid there, and not into a
            # pipe that nobody reads.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK
            with contextlib.suppress(OSError):
                with open(os.open(path, flags, 0o644), "a") as file:
                    file.write(text)
                return path
        return None

    def capture(self) -> None:
        """Takes in what libraries print on standard output and error.

        They say there which processes have met, and where one dies those of the
        others print a hundred lines and abort. Python's own sys.stdout and
        sys.stderr stay the user's.
        """
        import tempfile

        # It stays open until the process ends.
        self._captured = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout = _redirect(sys.stdout, 1, self._captured.fileno())
        sys.stderr = _redirect(sys.stderr, 2, self._captured.fileno())
        threading.excepthook = self._thread_failed
        self._on_abort()

    def connected(self) -> None:
        """From here on an abort means that another process is gone."""
        self._connecting = False

    def finish(self, code: int) -> None:
        """The rest is known: an abort while JAX shuts down changes nothing."""
        self._finished = code

    def lost(self, error: str) -> NoReturn:
        """Ends the process because another one has."""
        path = self.write(error)
        exit_now(
            "Another process died or left: the connection to it is lost. Its "
            "own output says why; the same command on all hosts goes on from "
            f"the last checkpoint.{_see_file(path)}",
            RESUME,
        )

    def unexpected(self, error: BaseException) -> NoReturn:
        """Ends the process with what nobody has foreseen."""
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
        """JAX aborts where it loses another process, in a thread of its own.

        Python's handlers would run later and in the main thread: never.
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
            path = self.write("The processes did not meet.")
            exit_now(
                "The processes did not meet: give the same --coordinator, an "
                "address that all reach, and --num_processes to all of them, and "
                f"to each a --process_id of its own, within a minute.{_see_file(path)}",
                1,
            )
        self.lost("JAX aborted the process.")


def _redirect(stream: TextIO, number: int, captured: int) -> TextIO:
    """Gives a stream a descriptor of its own, and its old one to libraries."""
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
