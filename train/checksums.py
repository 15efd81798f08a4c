"""Checksums of the files of a checkpoint, which tell damage from all else."""

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
# Orbax writes these after the checksums; it can do without what they say.
_LATER = ("_CHECKPOINT_METADATA", atomicity.COMMIT_SUCCESS_FILE)


class CorruptCheckpoint(Exception):
    """A file is not as it was written."""


class ChecksummedPath(atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that gets its checksums before it gets its name.

    Whatever has a name is therefore complete, and can be verified.
    """

    async def finalize(self) -> None:
        folder = pathlib.Path(self.get())
        if atomicity.TMP_DIR_SUFFIX not in folder.parent.name:  # of no item
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
    """Reads files of a checkpoint and compares.

    Args:
      folder: of the checkpoint.
      under: begin of the names of those to read; all by default.

    Raises:
      CorruptCheckpoint: a file differs from what was written, or is missing.
      OSError: one cannot be read, which says nothing about what is in it.
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
            raise CorruptCheckpoint(f"{name} is not as it was written")
    for name in _LATER:
        path = folder / name
        if path.exists() and not path.is_file():
            raise CorruptCheckpoint(f"{name} is no regular file")


def _open(folder: pathlib.Path, name: str) -> BinaryIO:
    path = folder / name
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptCheckpoint(f"{name} is no regular file")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CorruptCheckpoint(f"{name} is missing") from error
