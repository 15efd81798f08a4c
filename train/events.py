"""Writes TensorBoard events that a resumed run does not repeat."""

from __future__ import annotations

import pathlib
import secrets
import time
from collections.abc import Mapping

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

FLUSH = 30.0  # seconds after which `write` flushes


class Events:
    """Writes scalars to a new event file, in the calling thread.

    tensorboardX's SummaryWriter writes in its own thread, where a full disk
    raises an exception that its caller never sees.

    The file begins with a SessionLog START. TensorBoard drops the events from
    that step on that earlier files of the directory hold, which a run wrote
    after its last checkpoint: the resumed run writes them again.

    Args:
      folder: directory of the events; the file is created with the first one.
      after: number of completed steps, whose events are kept.
    """

    def __init__(self, folder: pathlib.Path, *, after: int):
        self._folder, self._after = folder, after
        self._writer: EventsWriter | None = None
        self._flushed = time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step.

        Raises:
          OSError: the file cannot be written.
        """
        if self._writer is None:
            # An unpredictable name, so that it cannot be a symbolic link.
            self._writer = EventsWriter(
                str(self._folder.absolute() / "events"),
                filename_suffix=f".{secrets.token_hex(4)}",
            )
            start = SessionLog(status=SessionLog.START)
            self._write(self._after + 1, session_log=start)
        for tag, value in scalars.items():
            self._write(step, summary=summary.scalar(tag, value))
        if time.monotonic() - self._flushed > FLUSH:
            self.flush()

    def _write(self, step: int, **fields: object) -> None:
        event = Event(wall_time=time.time(), step=step, **fields)
        self._writer.write_event(event)

    def flush(self) -> None:
        """Flushes the file to disk, if there is one."""
        if self._writer is not None:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is not None:
            self._writer.close()
