"""What a run leaves in its workdir, and what it shows while it goes on."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, Self

import matplotlib
import tensorboardX
import tqdm
from ml_collections import ConfigDict

from train import UserError
from train.files import write_json, write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Where the data lies and how many devices are simulated may change from one
# start of a run to the next; it is still the same run.
OF_THE_MACHINE = (
    "data_dir",
    "cpu_devices",
    "checkpoint_every",
    "mesh",
    "microbatches",
    "profile",
    "seeds",
    "steps_per_dispatch",
)


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Creates the workdir, or checks that it belongs to this very run.

    Raises:
      UserError: it holds a run with another config, or cannot be written.
    """
    path = workdir / "config.json"
    now = json.loads(config.to_json())
    if path.exists():
        then = json.loads(path.read_text())
        for key in sorted({*now, *then} - {*OF_THE_MACHINE}):
            if now.get(key) != then.get(key):
                raise UserError(
                    f"{workdir} holds another run: there {key} is "
                    f"{then.get(key)!r}, here {now.get(key)!r}. Take another "
                    "--workdir, or the config of that run to go on with it."
                )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    except OSError as error:
        raise UserError(
            f"Cannot write to --workdir={workdir}: {error.strerror}."
        ) from error


class SilentReport:
    """The report of a process that leaves the telling to another."""

    def __init__(self, *_: Any, done: int, **__: Any):
        self.records: list[dict[str, float]] = [{}] * done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def advance(self, images: int) -> None:
        pass

    def add(self, record: dict[str, float]) -> None:
        self.records.append(record)


class Report:
    """Epoch records as JSON lines, TensorBoard events, picture and text.

    Args:
      workdir: of the run.
      epochs: that the run will have.
      images_per_epoch: that training reads.
      done: epochs finished before; later records are left from a crash and
        are dropped.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        epochs: int,
        images_per_epoch: int,
        done: int,
    ):
        self._workdir = workdir
        self._path = workdir / "metrics.jsonl"
        self.records = _read_records(self._path)[:done]
        self._write_records()
        self._events = tensorboardX.SummaryWriter(str(workdir))
        self._epochs = epochs
        self._live = sys.stdout.isatty()
        self._bar = tqdm.tqdm(
            total=epochs * images_per_epoch,
            initial=done * images_per_epoch,
            unit=" images",
            unit_scale=True,
            file=sys.stdout,
            disable=not self._live,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._events.close()

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self._live:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def advance(self, images: int) -> None:
        """Moves the progress bar."""
        self._bar.update(images)

    def add(self, record: dict[str, float]) -> None:
        """Takes the record of an epoch."""
        self.records.append(record)
        self._write_records()
        step = int(record["step"])
        for key, value in record.items():
            if key not in ("epoch", "step"):
                self._events.add_scalar(key, value, step)
        self._events.flush()
        draw(self.records, self._workdir / "curves.png")
        self.say(
            f"epoch {record['epoch']}/{self._epochs}"
            f"  train loss {record['train_loss']:.4f}"
            f" accuracy {record['train_accuracy']:.2%}"
            f"  test loss {record['test_loss']:.4f}"
            f" accuracy {record['test_accuracy']:.2%}"
            f"  {record['images_per_second']:,.0f} images/s"
        )

    def _write_records(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        write_text(self._path, lines)


def _read_records(path: pathlib.Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(records: list[dict[str, float]], path: pathlib.Path) -> None:
    """Draws loss and accuracy over the epochs into a PNG."""
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
    figure.savefig(path, dpi=150)
    plt.close(figure)
