"""Cache of the decoded images and labels of a split, in one file.

Decoding the PNGs of CIFAR-10 takes seconds; mapping their pixels into memory
does not. The file is a line of JSON, its key and a checksum, followed by
labels (N) and images (N, H, W, C), both uint8.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.files import atomic_write

_FORMAT = "jaxbn pixels 1"
_HEADER_BYTES = 1 << 20  # upper limit of the first line


class PixelCache(NamedTuple):
    """The cache file of a split, next to the files that it is decoded from."""

    path: pathlib.Path
    sources: Sequence[pathlib.Path]
    shape: tuple[int, ...]  # (N, H, W, C)

    def key(self) -> dict[str, Any]:
        """Returns what the cache depends on, for the header.

        Raises:
          OSError: a source cannot be found.
        """
        stats = [(path.name, path.stat()) for path in self.sources]
        return {
            "format": _FORMAT,
            "sources": [[n, s.st_size, s.st_mtime_ns] for n, s in stats],
            "shape": list(self.shape),
        }

    def writable(self) -> bool:
        """Whether a cache file can be created, as far as permissions tell.

        Root could also write to a directory without write permission, but it
        is not meant to change.
        """
        folder = self.path.parent
        with contextlib.suppress(OSError):
            if folder.stat().st_mode & 0o222:
                return os.access(folder, os.W_OK | os.X_OK)
        return False

    def read(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns images and labels mapped into memory, read-only.

        None if there is no cache file, or if it is not exactly what `write`
        writes for the sources as they are now: the checksum is verified.
        """
        # A broken header may lead to any of these errors.
        with contextlib.suppress(OSError, ValueError, RecursionError):
            # Reading a pipe could block forever.
            if stat.S_ISREG(self.path.lstat().st_mode):
                return self._read()
        return None

    def _read(self) -> tuple[np.ndarray, np.ndarray] | None:
        with self.path.open("rb") as file:
            line = file.readline(_HEADER_BYTES)
            header = json.loads(line)
            if not isinstance(header, dict):
                return None
            checksum = header.pop("checksum", None)
            size = self.shape[0] + math.prod(self.shape)
            complete = os.fstat(file.fileno()).st_size == len(line) + size
            if header != self.key() or not complete:
                return None
            data = np.memmap(file, np.uint8, "r", len(line), (size,))
        if checksum != _checksum(data):
            return None
        labels, images = np.split(data, self.shape[:1])
        return images.reshape(self.shape), labels

    def write(
        self, key: dict[str, Any], images: np.ndarray, labels: np.ndarray
    ) -> None:
        """Writes the file atomically; without effect where that is impossible.

        A complete file replaces the previous one, which processes that have
        mapped it keep. A symbolic link is replaced, not followed.

        Args:
          key: `key()` before the sources were read. If it has changed since,
            nothing is written.
          images: (N, H, W, C) uint8.
          labels: (N,), from 0 to 255.
        """
        data = np.concatenate([labels.astype(np.uint8), images.reshape(-1)])
        header = json.dumps(key | {"checksum": _checksum(data)}).encode()
        with contextlib.suppress(OSError):  # a full disk, for example
            if self.key() == key:
                with atomic_write(self.path) as file:
                    file.write(header + b"\n")
                    file.write(data)


def _checksum(data: np.ndarray) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
