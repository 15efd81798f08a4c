"""Locks a workdir for one run, and checks that all processes share it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Iterator

from train import UserError, processes

NAME = "lock"
# NFS clients may show stale directories for some seconds.
VISIBILITY_TIMEOUT = 15.0


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Context manager that creates and locks the workdir.

    The system releases the lock when the process exits in any way.

    Raises:
      UserError: another run holds the lock, the workdir cannot be written, or
        a process does not see the same workdir as the main one.
    """
    token = secrets.token_hex(8) if processes.is_main() else ""
    lock = None
    with processes.sync_errors():
        if processes.is_main():
            lock = _acquire(workdir, token)
    try:
        token = processes.all_gather(token)[0]
        with processes.sync_errors():
            if not processes.is_main():
                _check_visible(workdir, token)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _acquire(workdir: pathlib.Path, token: str) -> int:
    path = workdir / NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path, flags, 0o644)
    except OSError as error:
        raise UserError(
            f"Cannot write to --workdir={workdir}: {error.strerror}."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 1000, 0).decode(errors="replace")
        owner = owner.partition("\n")[2].strip()
        os.close(lock)
        raise UserError(
            f"Another run{f' ({owner})' if owner else ''} is using {workdir}: "
            "wait until it ends, stop it, or use another --workdir."
        ) from error
    except OSError:
        pass  # the file system does not support locks
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"{token}\nprocess {os.getpid()} on {socket.gethostname()}, "
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{text}since {started}\n".encode(), 0)
    except OSError as error:
        os.close(lock)
        raise UserError(
            f"Cannot write to --workdir={workdir}: {error.strerror}."
        ) from error
    return lock


def _check_visible(workdir: pathlib.Path, token: str) -> None:
    limit = time.monotonic() + VISIBILITY_TIMEOUT
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (workdir / NAME).read_text().partition("\n")[0] == token:
                return
        if time.monotonic() > limit:
            raise UserError(
                f"--workdir={workdir} is not the same directory on all hosts: "
                f"{socket.gethostname()} does not see the file that process 0 "
                "wrote there. Use a shared directory."
            )
        time.sleep(0.2)
