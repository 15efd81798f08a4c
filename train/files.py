"""Files that are there whole or not at all, and files of unknown content."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from train import UserError


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the place of path once it is whole.

    A crash, of the machine too, leaves the old file or the new. What lies at
    path is replaced and never written through, be it a link: the folder may
    come from a stranger.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(partial, flags, 0o666), "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            with contextlib.suppress(OSError):
                file.close()  # flushes, which may fail again
            raise
    with contextlib.suppress(OSError):  # some file systems cannot
        sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes a new name in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text in one piece: a crash leaves the old file or the new."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes value as JSON, likewise."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def as_user_error(what: pathlib.Path | str) -> Iterator[None]:
    """Raises UserError where what is inside cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write to {what}: {error.strerror or error}."
        ) from error


def exists(path: pathlib.Path) -> bool:
    """Whether there is something, be it unreadable or a link to nothing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # reading it says what is wrong
    return True


def refuse_links(folder: pathlib.Path, *, below: bool = False) -> None:
    """Raises UserError if a folder to be written to leads elsewhere.

    A library would write through a link, or delete what it leads to.

    Args:
      folder: that may not be there yet.
      below: looks at all that is below it too, not only at what it holds.
    """
    links = [folder] if folder.is_symlink() else []
    if not links and folder.is_dir():
        with as_user_error(folder):
            inside = folder.rglob("*") if below else folder.iterdir()
            links = [path for path in inside if path.is_symlink()]
    if links:
        raise UserError(
            f"{links[0]} is a link, and nothing is written through the links of "
            "a workdir. Put in its place what it leads to, or take another "
            "--workdir."
        )


def read_text(path: pathlib.Path) -> str:
    """Returns the text of a file.

    Raises:
      UserError: it cannot be read, is no file, or holds no text.
    """
    try:
        # A pipe would be waited for, a device read for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} cannot be read: it is no regular file.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it holds no text.") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Returns the JSON object in text; where is what a message calls it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{where} is damaged: it holds {text.strip()[:20]!r} where {{...}} "
            "belongs."
        )
    return found
