"""Atomic writes, and reads that validate their input."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from train import UserError


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces path once it is complete.

    After a crash, even of the machine, path is the old file or the new one. A
    symbolic link at path is replaced, not followed: the directory may not be
    trusted.
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
    """Flushes a directory to disk, so that new names survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes value as JSON atomically; see `to_json`."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Returns value as JSON, with null for numbers that are not finite.

    JSON has no NaN or Infinity. Python would write them nevertheless, and
    other programs could not read the file.
    """
    return json.dumps(nonfinite_to_none(value), indent=indent, allow_nan=False)


def nonfinite_to_none(
    value: Any, *, default: Callable[[Any], Any] | None = None
) -> Any:
    """Returns a JSON value with None for numbers that are not finite.

    Args:
      value: what json.dumps can convert.
      default: as of json.dumps.
    """
    text = json.dumps(value, default=default)
    return json.loads(text, parse_constant=lambda _: None)


def none_to_nan(value: float | None) -> float:
    """Returns a number that `nonfinite_to_none` may have replaced."""
    return math.nan if value is None else value


@contextlib.contextmanager
def as_user_error(what: pathlib.Path | str) -> Iterator[None]:
    """Turns an OSError of the context into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write to {what}: {error.strerror or error}."
        ) from error


def exists(path: pathlib.Path) -> bool:
    """Whether path exists, even if unreadable or a broken link."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # reading it reports the error
    return True


def refuse_links(folder: pathlib.Path, *, below: bool = False) -> None:
    """Raises UserError if a directory is or contains a symbolic link.

    Libraries would write through the link, or delete its target.

    Args:
      folder: the directory; it may not exist yet.
      below: checks recursively, not only its entries.
    """
    links = [folder] if folder.is_symlink() else []
    if not links and folder.is_dir():
        with as_user_error(folder):
            inside = folder.rglob("*") if below else folder.iterdir()
            links = [path for path in inside if path.is_symlink()]
    if links:
        raise UserError(
            f"{links[0]} is a symbolic link, and links in a workdir are not "
            "followed. Replace it by its target, or use another --workdir."
        )


def read_text(path: pathlib.Path) -> str:
    """Returns the text of a file.

    Raises:
      UserError: it cannot be read, is not a regular file, or is not text.
    """
    try:
        # Reading a pipe or a device could block forever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} cannot be read: it is not a regular file.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8 text.") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
      UserError: it cannot be read, or is not a JSON object.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON object; where names its origin in errors."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{where} is damaged: expected a JSON object; got "
            f"{text.strip()[:20]!r}."
        )
    return found
