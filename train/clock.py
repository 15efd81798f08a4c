"""A line on the terminal that shows an activity and its seconds, in place."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

from train import output

LONG = 10.0  # seconds after which `show` prints how long it took


class _Line:
    """What is drawn in place, where the next print must not append to it."""

    running: _Clock | None = None  # on a line of its own
    drawn = 0  # characters of that line
    bar = False  # whether a progress bar is on the line


_line = _Line()


class _Clock:
    """Draws "text (12 s)" every second from a thread, until it is stopped."""

    def __init__(self, text: str, draw: Callable[[str], object]):
        self._text, self._draw = text, draw
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._drawing = threading.Thread(target=self._run, daemon=True)
        self._drawing.start()

    def _run(self) -> None:
        seconds = 0
        while True:
            self._draw(f"{self._text} ({seconds} s)" if seconds else self._text)
            if self._stopped.wait(1.0):
                break
            seconds = int(time.monotonic() - self._started)
        self._draw("")

    def stop(self) -> None:
        """Stops drawing; the line is empty afterwards."""
        self._stopped.set()
        self._drawing.join()


@contextlib.contextmanager
def show(
    text: str,
    main: bool = True,
    *,
    done: str = "",
    draw: Callable[[str], object] | None = None,
    say: Callable[[str], object] = output.say,
) -> Iterator[None]:
    """Shows an activity and its seconds on the terminal, if there is one.

    Args:
      text: the activity, such as "compiling".
      main: False shows nothing.
      done: such as "compiled"; if it took longer than LONG, this and the
        seconds are printed at the end, without a terminal as well.
      draw: shows a text in place, and nothing for an empty one. None draws on a
        line of its own, until `end_line`.
      say: prints a line.
    """
    started = time.monotonic()
    shown = None
    if main and output.is_terminal():
        if draw is None:
            start(text)
        else:
            shown = _Clock(text, draw)
    try:
        yield
    finally:
        if shown is not None:
            shown.stop()
        elif main and draw is None:
            end_line()
    seconds = time.monotonic() - started
    if main and done and seconds > LONG:
        say(f"{done} in {seconds:.0f} s")


def start(text: str) -> None:
    """Shows an activity on a line of its own until `end_line`."""
    end_line()
    if output.is_terminal():
        _line.running = _Clock(f"{text} ...", _draw)


def end_line() -> None:
    """Erases the line that `start` draws, or ends that of a progress bar.

    What is printed next begins a line of its own.
    """
    running, _line.running = _line.running, None
    if running is not None:
        running.stop()
    if _line.bar:
        _line.bar = False
        output.say("")


def set_bar(shown: bool) -> None:
    """Sets whether a progress bar is on the terminal's last line."""
    _line.bar = shown


def _draw(text: str) -> None:
    text = text[: shutil.get_terminal_size().columns - 1]
    blank = " " * (_line.drawn - len(text))
    _line.drawn = len(text)
    try:
        sys.stdout.write(f"\r{text}{blank}" if text else f"\r{blank}\r")
        sys.stdout.flush()
    except (OSError, ValueError):
        # The next line that is printed reports it.
        _line.drawn = 0
