"""Reports progress: console, metrics.jsonl, plot, TensorBoard and W&B."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Self

import tqdm

from train import UserError, clock, output
from train.events import Events
from train.files import as_user_error, to_json, write_text
from train.learning_curves import draw_run
from train.state import Sums
from train.wandb_run import WandbRun
from train.workdir import missing_epochs, read_records

STEPS = 10  # at least, between two losses of steps in TensorBoard


class NullReport:
    """Report of a process that does not write."""

    def __init__(self, workdir: pathlib.Path, **_: Any):
        self.workdir = workdir
        self.records: list[dict[str, float]] = []

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

    def step(self, step: int, sums: Sums) -> None:
        pass

    def add(self, record: dict[str, float]) -> None:
        self.records.append(record)


class Report:
    """Writes epoch records as JSON lines, TensorBoard events, plot and text.

    Args:
      workdir: directory of the run.
      tested: epochs that are recorded, from 1; the last one ends the run.
      done: number of completed epochs; later records, left by a crash, are
        dropped.
      images: number of images of the run, each as often as it is processed.
      images_done: number of images that have been processed.
      step: number of completed steps; later TensorBoard events are dropped.
      title: of the plot.
      wandb: project of Weights & Biases to log to as well, or None.
      label: begins each line and the progress bar, such as "seed 3/5".

    Raises:
      UserError: the existing records are damaged, lack the result of a
        finished run, or the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        tested: Sequence[int],
        done: int,
        images: int,
        images_done: int,
        step: int = 0,
        title: str = "",
        wandb: str | None = None,
        label: str = "",
    ):
        self.workdir = workdir
        self._path = workdir / "metrics.jsonl"
        missing = self._open_records(tested, done)
        self._events = Events(workdir, after=step)
        self._epochs, self._title = tested[-1], title
        self._logged = step  # newest step whose loss is in TensorBoard
        self._unwritten: OSError | None = None  # raised in writing a step
        self._label = label and f"{label} "
        self._wandb: WandbRun | None = None
        if wandb is not None:
            group = workdir.absolute().parent.name if label else ""
            self._wandb = WandbRun(
                wandb, workdir, records=self.records, group=group
            )
        self._live = output.is_terminal()
        self._bar = tqdm.tqdm(
            desc=label or None,
            total=images,
            initial=images_done,
            unit=" images",
            unit_scale=True,
            file=sys.stdout,
            disable=not self._live,
            dynamic_ncols=True,
        )
        clock.set_bar(self._live)
        if missing:
            self.say(f"{self._path} lacks {missing}; continuing without")

    def _open_records(self, tested: Sequence[int], done: int) -> str:
        """Reads the records; returns the epochs that lack one, as text."""
        found = read_records(self.workdir)
        self.records = [one for one in found if one["epoch"] <= done]
        expected = [epoch for epoch in tested if epoch <= done]
        missing = missing_epochs(self.records, expected)
        if done == tested[-1] and missing_epochs(self.records, tested[-1:]):
            raise UserError(
                f"{self.workdir} is fully trained, but {self._path.name} lacks "
                f"{missing}, and so the result: run python -m train.evaluate "
                f"{self.workdir}."
            )
        if len(self.records) < len(found) or not self._path.exists():
            with as_user_error(self.workdir):
                self._write_records()
        return missing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._to_terminal(self._bar.close)
        clock.set_bar(False)
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)
        try:
            self._events.close()
        except OSError as error:
            # Each epoch has been flushed already. If there was an earlier
            # error, report that one.
            if kind is None:
                raise UserError(
                    f"Cannot write to {self.workdir}: {error.strerror}."
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

    def step(self, step: int, sums: Sums) -> None:
        """Records the loss of a step in TensorBoard, every STEPS steps.

        An error in writing is raised by `add`, at the end of the epoch.
        """
        if step // STEPS == self._logged // STEPS or not sums.count:
            return
        self._logged = step
        try:
            if self._unwritten is None:
                loss = float(sums.loss / sums.count)
                self._events.write(step, {"train/step_loss": loss})
        except OSError as error:
            self._unwritten = error

    def add(self, record: dict[str, float]) -> None:
        """Records the metrics of an epoch.

        Raises:
          OSError: a file cannot be written.
        """
        if self._unwritten is not None:
            raise self._unwritten
        self.records.append(record)
        self._write_records()
        scalars = {
            k: v for k, v in record.items() if k not in ("epoch", "step")
        }
        self._events.write(int(record["step"]), scalars)
        self._events.flush()
        if self._wandb is not None:
            self._wandb.log(record)
        draw_run(self.records, self.workdir / "curves.png", self._title)
        line = (
            f"epoch {record['epoch']}/{self._epochs}"
            f"  train {record['train_loss']:.4f}"
            f" {record['train_accuracy']:.2%}"
            f"  test {record['test_loss']:.4f}"
            f" {record['test_accuracy']:.2%}"
        )
        if "images_per_second" in record:
            line += f"  {record['images_per_second']:,.0f} images/s"
        self.say(line)

    def _write_records(self) -> None:
        lines = "".join(to_json(record) + "\n" for record in self.records)
        write_text(self._path, lines)
