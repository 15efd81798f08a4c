"""SIGTERM and Ctrl-C as a wish to stop between two steps."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Self

from train import INTERRUPTED, RESUME, exits

_CODES = {signal.SIGTERM: RESUME, signal.SIGINT: INTERRUPTED}


class _State:
    listening = False
    requested: int | None = None  # the signal
    unsaved = False  # whether steps would be lost
    notify: Callable[[], Any] | None = None  # the other processes, through JAX


_state = _State()


def listen() -> None:
    """Takes over both signals, for a program and from its first moment.

    Python runs a handler between two of its instructions, which a compilation
    or a collective can delay by minutes. A thread that waits for the signals
    acts at once: it ends the process where no step would be lost, or at the
    second signal, and else leaves the stop to the training loop.
    """
    _listen(_received, *_CODES)
    _state.listening = True


def exit_on_ctrl_c(program: str) -> None:
    """Has Ctrl-C end at once a program that has nothing to save.

    An exception would come up in the midst of an import too, where libraries
    make another one of it, or crash.
    """

    def received(_: int) -> None:
        exits.exit_now("interrupted", INTERRUPTED, program=program)

    _listen(received, signal.SIGINT)


def _listen(received: Callable[[int], Any], *numbers: int) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in numbers:
        # A shell starts what is in the background with Ctrl-C ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _wake)
    threading.Thread(
        target=_watch, args=(read, received, numbers), daemon=True
    ).start()


def forward_to_jax() -> None:
    """Lets JAX tell the other processes, once it knows them.

    JAX has replaced the handler of SIGTERM by its own, from which all processes
    agree on a step. It is called here, for both signals.
    """
    if not _state.listening:
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    of_jax = libc.signal(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, _wake)
    if of_jax:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(of_jax)
        _state.notify = lambda: handler(signal.SIGTERM)


def _wake(_: int, __: FrameType | None) -> None:
    """The thread has been woken already."""


def _watch(
    pipe: int, received: Callable[[int], Any], numbers: Sequence[int]
) -> None:
    while True:
        for number in os.read(pipe, 64):
            if number in numbers:
                received(number)


def _received(number: int) -> None:
    code = _CODES[signal.Signals(number)]
    if _state.requested is not None:
        exits.exit_now(
            "Left at once, without saving; the same command goes on from the "
            "last checkpoint.",
            code,
        )
    if not _state.unsaved:
        exits.exit_now(
            "Stopped with nothing to save; give the same command again to "
            "train.",
            code,
        )
    _state.requested = number
    if _state.notify is not None:
        _state.notify()


class Interrupt:
    """Says whether to stop, while it is a context.

    With several processes JAX agrees on a step with the others; there `requested`
    stays False. Where the program does not `listen`, SIGTERM alone is noted.
    """

    def __init__(self, processes: int = 1) -> None:
        self._alone = processes == 1
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and self._alone and not _state.listening
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._ours:
            _state.requested = None
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        _state.unsaved = False
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)
            _state.requested = None

    @property
    def requested(self) -> bool:
        return self._alone and _state.requested is not None

    @property
    def code(self) -> int:
        """What a program that stops now exits with."""
        if _state.requested is None:  # another process was told
            return RESUME
        return _CODES[signal.Signals(_state.requested)]

    def unsaved(self, steps: bool) -> None:
        """Notes whether there are steps that no checkpoint holds."""
        _state.unsaved = steps

    def _note(self, number: int, _: FrameType | None) -> None:
        _state.requested = number
