"""Checksums of checkpoint files, to detect damage."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pathlib
import stat
from typing import BinaryIO

from orbax.checkpoint.path import atomicity

from train.files import sync_folder

NAME = "checksums.json"
# Orbax writes these after the checksums; they are not needed to restore.
_LATER = ("_CHECKPOINT_METADATA", atomicity.COMMIT_SUCCESS_FILE)


class CorruptCheckpoint(Exception):
    """A file has changed since it was written, or is missing."""


class ChecksummedPath(atomicity.AtomicRenameTemporaryPath):
    """Writes checksums before a checkpoint is renamed to its final name.

    So every checkpoint with a final name is complete and can be verified.
    """

    async def finalize(self) -> None:
        folder = pathlib.Path(self.get())
        if atomicity.TMP_DIR_SUFFIX not in folder.parent.name:  # not an item's
            await asyncio.to_thread(_write_checksums, folder)
        await super().finalize()
        folder = pathlib.Path(self.get_final()).parent
        await asyncio.to_thread(sync_folder, folder)


def _write_checksums(folder: pathlib.Path) -> None:
    sums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _LATER:
            with path.open("rb") as file:
                sums[name] = _digest(file)
                os.fsync(file.fileno())
    with (folder / NAME).open("x") as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _digest(file: BinaryIO) -> str:
    return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def verify(folder: pathlib.Path, under: str = "") -> None:
    """Verifies the checksums of a checkpoint's files.

    Args:
      folder: the checkpoint.
      under: prefix of the file names to verify; all by default.

    Raises:
      CorruptCheckpoint: a file has changed since it was written, or is missing.
      OSError: a file cannot be read; it may be intact.
    """
    with _open(folder, NAME) as file:
        text = file.read()
    try:
        sums = json.loads(text)
        names = [name for name in sums if name.startswith(under)]
        wanted = {name: str(sums[name]) for name in names}
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{NAME} cannot be decoded") from error
    if not wanted:
        raise CorruptCheckpoint(f"{NAME} names no files")
    for name, digest in wanted.items():
        with _open(folder, name) as file:
            found = _digest(file)
        if found != digest:
            raise CorruptCheckpoint(f"{name} has a wrong checksum")
    for name in _LATER:
        path = folder / name
        if path.exists() and not path.is_file():
            raise CorruptCheckpoint(f"{name} is not a regular file")


def _open(folder: pathlib.Path, name: str) -> BinaryIO:
    path = folder / name
    try:
        # Opening a pipe would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptCheckpoint(f"{name} is not a regular file")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CorruptCheckpoint(f"{name} is missing") from error
