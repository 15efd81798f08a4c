"""Graceful stop between two steps on SIGTERM and Ctrl-C."""

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
    unsaved = False  # whether exiting now would lose steps
    notify: Callable[[], Any] | None = (
        None  # notifies other processes through JAX
    )


_state = _State()


def listen() -> None:
    """Installs handlers for both signals; call at program start.

    Python runs signal handlers between bytecode instructions, which a
    compilation or a collective can delay by minutes. A background thread reacts
    immediately: it exits if no step would be lost, or on the second signal, and
    otherwise leaves stopping to the training loop.
    """
    _listen(_received, *_CODES)
    _state.listening = True


def exit_on_ctrl_c(program: str) -> None:
    """Makes Ctrl-C exit immediately, for programs with nothing to save.

    KeyboardInterrupt could be raised during an import, where libraries replace
    it by another exception or crash.
    """

    def received(_: int) -> None:
        exits.exit_now("interrupted", INTERRUPTED, program=program)

    _listen(received, signal.SIGINT)


def _listen(received: Callable[[int], Any], *numbers: int) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in numbers:
        # Shells start background jobs with Ctrl-C ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _wake)
    threading.Thread(
        target=_watch, args=(read, received, numbers), daemon=True
    ).start()


def forward_to_jax() -> None:
    """Forwards signals to other processes; call after JAX has connected them.

    JAX has installed its own SIGTERM handler, through which all processes agree
    on a step to stop at. It is called here for both signals.
    """
    if not _state.listening:
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    jax_handler = libc.signal(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, _wake)
    if jax_handler:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(jax_handler)
        _state.notify = lambda: handler(signal.SIGTERM)


def _wake(_: int, __: FrameType | None) -> None:
    """Does nothing: the wakeup descriptor has woken the thread."""


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
            "Exited immediately, without saving; rerun the same command, with "
            "the --workdir, to resume from the last checkpoint.",
            code,
        )
    if not _state.unsaved:
        exits.exit_now(
            "Stopped with nothing to save; rerun the same command to train.",
            code,
        )
    _state.requested = number
    if _state.notify is not None:
        _state.notify()


class Interrupt:
    """Context manager that says whether a stop was requested.

    With several processes JAX agrees on a step to stop at, and `requested`
    stays False. If the program did not call `listen`, only SIGTERM counts.
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
        """Exit code of a program that stops now."""
        if _state.requested is None:  # another process received the signal
            return RESUME
        return _CODES[signal.Signals(_state.requested)]

    def set_unsaved(self, unsaved: bool) -> None:
        """Sets whether there are steps that are not checkpointed."""
        _state.unsaved = unsaved

    def _note(self, number: int, _: FrameType | None) -> None:
        _state.requested = number
