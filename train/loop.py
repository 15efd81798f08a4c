"""Trains a model from a config, with results in a workdir."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from train import (
    UserError,
    clock,
    load,
    lock,
    networks,
    processes,
)
from train.checkpoint import Checkpoints, Progress
from train.checkpoint_errors import resume_hint
from train.epoch import EpochRunner
from train.experiment import Experiment, build_experiment
from train.files import write_json
from train.report import NullReport, Report
from train.signals import Interrupt
from train.state import abstract_state, init_state
from train.summary import headline, summarize
from train.timing import Timer
from train.trace import Trace
from train.weight_average import evaluate_average
from train.workdir import check_name, open_workdir, read_summary


def train(
    config: ConfigDict, workdir: pathlib.Path, **options: Any
) -> dict[str, Any]:
    """Trains a model and returns the contents of summary.json.

    A workdir with the same config is resumed from its last checkpoint.

    Args:
      config: config of the run.
      workdir: directory of the run.
      **options: further arguments of `Report`.

    Raises:
      UserError: the config is invalid, with what to change.
      Stopped: a signal was received; the state is saved.
    """
    started = time.monotonic()
    check_name(workdir)
    with clock.show(f"reading {config.dataset}", processes.is_main()):
        experiment = build_experiment(config)
    with lock.locked(workdir):
        with processes.sync_errors():
            if processes.is_main():
                open_workdir(workdir, config)
                load.record(workdir, experiment.dataset, experiment.recipe)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return _train(
                config, workdir, experiment, checkpoints, started, options
            )


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    experiment: Experiment,
    checkpoints: Checkpoints,
    started: float,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Trains in a workdir that is locked."""
    topology, dataset, steps, _, recipe = experiment
    shape = dataset.train.images.shape[1:]
    progress = Progress()
    main = processes.is_main()
    with clock.show("reading checkpoints", main):
        like = abstract_state(recipe, shape, topology.mesh)
        found = checkpoints.restore(like)
    if found:
        state, progress = found
        summary = processes.broadcast_from_main(lambda: read_summary(workdir))
        done = progress.epoch * steps + progress.batch
        if done >= config.epochs * steps and summary:
            return summary
    else:
        with clock.show("initializing", main):
            state = init_state(recipe, shape, topology.mesh)
    timer = Timer()
    kind = Report if main else NullReport
    profile = config.profile and main
    with (
        kind(
            workdir,
            epochs=config.epochs,
            images_per_epoch=steps * config.batch_size,
            done=progress.epoch,
            step=progress.epoch * steps + progress.batch,
            title=f"{networks.title(config)} on {config.dataset}",
            **options,
        ) as report,
        Interrupt(jax.process_count()) as interrupt,
        Trace(workdir / "profile" if profile else None, report.say) as trace,
    ):
        report.say(headline(config, experiment, state.params, progress))
        runner = EpochRunner(
            config, experiment, report, checkpoints, timer, interrupt, trace
        )
        for epoch in range(progress.epoch, config.epochs):
            state, record = runner.epoch(state, progress)
            with timer.measure("save"):
                # At most one record may be ahead of the checkpoints.
                checkpoints.wait()
            try:
                report.add(record)
            except OSError as error:
                raise UserError(
                    f"Cannot write to {workdir}: {error.strerror}. "
                    f"{resume_hint(checkpoints.newest)}"
                ) from error
            progress = Progress(epoch + 1)
            with timer.measure("save"):
                checkpoints.save(
                    state, progress, test_accuracy=record["test_accuracy"]
                )
        with timer.measure("save"):
            checkpoints.wait()
        interrupt.unsaved(False)
        extra = {}
        if state.average is not None:
            extra = evaluate_average(config, experiment, state, runner.test)
        report.say(f"time: {timer}")

    def summary() -> dict[str, Any]:
        """Runs in the main process, which has the records."""
        found = summarize(report.records, experiment, started, timer) | extra
        try:
            write_json(workdir / "summary.json", found)
        except OSError as error:
            raise UserError(
                f"Cannot write {workdir / 'summary.json'}: {error.strerror}. "
                f"{resume_hint(checkpoints.newest)}"
            ) from error
        return found

    return processes.broadcast_from_main(summary)
