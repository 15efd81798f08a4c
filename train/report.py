"""Reports progress: console, metrics.jsonl, TensorBoard and a plot."""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

import matplotlib
import tqdm
from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from train import UserError, clock, output
from train.files import as_user_error, atomic_write, write_text
from train.workdir import missing_epochs, read_records

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class NullReport:
    """Report of a process that does not write."""

    def __init__(self, *_: Any, done: int, **__: Any):
        self.records: list[dict[str, float]] = [{}] * done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    @contextlib.contextmanager
    def clock(self, text: str, *, done: str = "") -> Iterator[None]:
        yield

    def advance(self, images: int) -> None:
        pass

    def add(self, record: dict[str, float]) -> None:
        self.records.append(record)


class Report:
    """Writes epoch records as JSON lines, TensorBoard events, plot and text.

    Args:
      workdir: directory of the run.
      epochs: total number of epochs.
      images_per_epoch: number of training images per epoch.
      done: number of completed epochs; later records, left by a crash, are
        dropped.
      label: begins each line and the progress bar, such as "seed 3/5".

    Raises:
      UserError: the existing records are damaged, lack the result of a
        finished run, or the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        epochs: int,
        images_per_epoch: int,
        done: int,
        label: str = "",
    ):
        self._workdir = workdir
        self._path = workdir / "metrics.jsonl"
        found = read_records(workdir)
        self.records = [one for one in found if one["epoch"] <= done]
        missing = missing_epochs(self.records, done)
        if (
            missing
            and done == epochs
            and missing_epochs(self.records[-1:], done)
        ):
            raise UserError(
                f"{workdir} is fully trained, but {self._path.name} lacks "
                f"{missing}, and so the result: run python -m train.evaluate "
                f"{workdir}."
            )
        if len(self.records) < len(found) or not self._path.exists():
            with as_user_error(workdir):
                self._write_records()
        self._events: EventsWriter | None = None  # created with the first epoch
        self._epochs = epochs
        self._label = label and f"{label} "
        self._live = output.is_terminal()
        self._bar = tqdm.tqdm(
            desc=label or None,
            total=epochs * images_per_epoch,
            initial=done * images_per_epoch,
            unit=" images",
            unit_scale=True,
            file=sys.stdout,
            disable=not self._live,
            dynamic_ncols=True,
        )
        clock.below_bar(self._live)
        if missing:
            self.say(f"{self._path} lacks {missing}; continuing without")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._to_terminal(self._bar.close)
        clock.below_bar(False)
        try:
            if self._events is not None:
                self._events.close()
        except OSError as error:
            # Each epoch has been flushed already. If there was an earlier
            # error, report that one.
            if kind is None:
                raise UserError(
                    f"Cannot write to {self._workdir}: {error.strerror}."
                ) from error

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        line = self._label + line
        if self._live:
            wrapped = output.wrap(line)
            self._to_terminal(self._bar.write, wrapped, file=sys.stdout)
        else:
            output.say(line)

    @contextlib.contextmanager
    def clock(self, text: str, *, done: str = "") -> Iterator[None]:
        """Shows an activity and its seconds in the progress bar.

        The time does not count for the speed that the bar shows.

        Args:
          text: the activity, such as "compiling".
          done: such as "compiled"; if it took long, this and the seconds are
            printed at the end, without a terminal as well.
        """
        with clock.show(text, done=done, draw=self._describe, say=self.say):
            yield
        if self._live:
            self._bar.unpause()

    def _describe(self, text: str) -> None:
        self._to_terminal(
            self._bar.set_description, f"{self._label}{text}".strip()
        )

    def advance(self, images: int) -> None:
        """Moves the progress bar."""
        self._to_terminal(self._bar.update, images)

    def _to_terminal(self, move: Any, *arguments: Any, **options: Any) -> None:
        try:
            move(*arguments, **options)
        except OSError as error:  # the terminal is gone
            output.lost(error)

    def add(self, record: dict[str, float]) -> None:
        """Records the metrics of an epoch."""
        self.records.append(record)
        self._write_records()
        step = int(record["step"])
        self._write_events(record, step)
        draw(self.records, self._workdir / "curves.png")
        self.say(
            f"epoch {record['epoch']}/{self._epochs}"
            f"  train {record['train_loss']:.4f}"
            f" {record['train_accuracy']:.2%}"
            f"  test {record['test_loss']:.4f}"
            f" {record['test_accuracy']:.2%}"
            f"  {record['images_per_second']:,.0f} images/s"
        )

    def _write_records(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_text(self._path, lines)

    def _write_events(self, record: dict[str, float], step: int) -> None:
        """Appends to the TensorBoard file in this thread.

        tensorboardX's SummaryWriter writes in its own thread, where a full disk
        raises an exception that its caller never sees.
        """
        if self._events is None:
            # An unpredictable name, so that it cannot be a symbolic link.
            self._events = EventsWriter(
                str(self._workdir.absolute() / "events"),
                filename_suffix=f".{secrets.token_hex(4)}",
            )
        for key, value in record.items():
            if key not in ("epoch", "step"):
                self._events.write_event(
                    Event(
                        wall_time=time.time(),
                        step=step,
                        summary=tensorboard.scalar(key, value),
                    )
                )
        self._events.flush()


def draw(records: list[dict[str, float]], path: pathlib.Path) -> None:
    """Plots loss and accuracy over epochs to a PNG."""
    epochs = [record["epoch"] for record in records]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.5), layout="constrained"
    )
    for split in ("train", "test"):
        loss = [record[f"{split}_loss"] for record in records]
        accuracy = [100 * record[f"{split}_accuracy"] for record in records]
        left.plot(epochs, loss, marker=".", label=split)
        right.plot(epochs, accuracy, marker=".", label=split)
    left.set(xlabel="epoch", ylabel="loss (nats)")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    left.legend()
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
    finally:
        plt.close(figure)
