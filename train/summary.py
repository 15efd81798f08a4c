"""Headline, estimated time of arrival and summary of a run."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from train import networks
from train.checkpoint import Progress
from train.duration import Steps
from train.norms import describe_statistics
from train.report import Report
from train.session import Session
from train.timing import Timer
from train.workdir import median_speed


class RemainingTime:
    """Estimates once when the run will finish."""

    BEGIN, END = 3, 13  # dispatches that are timed; the first ones are slower

    def __init__(self, report: Report, steps: Steps):
        self._report, self._total = report, steps.total
        self._seen, self._started, self._before = 0, 0.0, 0

    def step(self, done: int) -> None:
        """Counts a dispatch.

        Args:
          done: number of completed steps; a dispatch may take several.
        """
        self._seen += 1
        if self._seen == self.BEGIN:
            self._started, self._before = time.monotonic(), done
        if self._seen == self.END:
            seconds = time.monotonic() - self._started
            left = seconds / (done - self._before) * (self._total - done)
            if left > 60:
                end = time.strftime("%H:%M", time.localtime(time.time() + left))
                self._report.say(f"about {left / 60:.0f} min left, until {end}")


def headline(config: ConfigDict, session: Session, progress: Progress) -> str:
    """Returns a one-line description of the run.

    Args:
      config: config of the run.
      session: components of the run.
      progress: position to start from.
    """
    topology, dataset, *_ = session.experiment
    params = session.programs.abstract_state.params
    device = topology.mesh.devices.flat[0]
    shape = " x ".join(f"{k}={v}" for k, v in topology.mesh.shape.items())
    processes = jax.process_count()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    resumed = ""
    if progress.batch:
        resumed = f", resuming in epoch {progress.epoch + 1}"
    elif progress.epoch:
        resumed = f", resuming after epoch {progress.epoch}"
    return (
        f"{networks.title(config)} ({parameters:,} parameters) on "
        f"{config.dataset}: {len(dataset.train.labels)} training and "
        f"{len(dataset.test.labels)} test images, batch {config.batch_size} "
        f"over {_count(topology.mesh.size, f'{device.device_kind} device')} "
        f"({shape}"
        f"{f', {processes} processes' if processes > 1 else ''}), "
        f"norm {config.norm}, {describe_statistics(config, topology)}{resumed}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of packages that affect results."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def summarize(
    records: list[dict[str, float]],
    session: Session,
    timer: Timer,
) -> dict[str, Any]:
    """Returns the contents of summary.json, except the duration of the run.

    Args:
      records: records of the epochs.
      session: components of the run.
      timer: time spent on each activity.
    """
    last = records[-1]
    mesh = session.experiment.topology.mesh
    tested = {k: v for k, v in last.items() if k.startswith("test_")}
    return {
        **tested,
        "epochs": last["epoch"],
        "steps": last["step"],
        "devices": mesh.size,
        "processes": jax.process_count(),
        "device_kind": mesh.devices.flat[0].device_kind,
        "versions": versions(),
        **median_speed(records),
        "time": {k: round(v, 4) for k, v in timer.shares().items()},
    }


def result(summary: dict[str, Any]) -> str:
    """Describes the result of a run, or of several seeds, in a sentence.

    Args:
      summary: contents of summary.json.
    """

    def spread(name: str, form: str) -> str:
        value = format(summary[name], form)
        deviation = summary.get(f"{name}_deviation")
        return value if deviation is None else f"{value} ± {deviation:{form}}"

    text = f"test accuracy {spread('test_accuracy', '.2%')}"
    if "test_accuracy_augmented" in summary:
        augmented = spread("test_accuracy_augmented", ".2%")
        text += f", {augmented} with test-time augmentation,"
    seeds = len(summary.get("seeds", ()))
    if seeds:
        text += f" over {seeds} seeds"
    text += (
        f" after {_count(summary['epochs'], 'epoch')} "
        f"({summary['steps']:,} steps)"
    )
    if "seconds" in summary:
        text += f" in {summary['seconds']:.0f} s"
    if "training_seconds" in summary:
        each = " for each seed" if seeds else ""
        seconds = spread("training_seconds", ".3f")
        text += f", {seconds} s of training and testing{each}"
    return text
