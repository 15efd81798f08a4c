"""Trains a model from a config, with results in a workdir."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from train import (
    Stopped,
    UserError,
    data,
    lock,
    processes,
    watchdog,
)
from train.checkpoint import Checkpoints, Progress, resume_hint
from train.experiment import Experiment, build_experiment
from train.files import write_json
from train.meter import Meter
from train.nonfinite import describe_nonfinite
from train.prefetch import prefetch
from train.report import NullReport, Report
from train.signals import Interrupt
from train.step import (
    TrainState,
    abstract_state,
    init_state,
    make_test_step,
    make_train_step,
)
from train.summary import RemainingTime, headline, summarize
from train.timing import Timer
from train.trace import Trace
from train.weight_average import evaluate_average
from train.workdir import check_name, open_workdir, read_summary


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a model and returns the contents of summary.json.

    A workdir with the same config is resumed from its last checkpoint.

    Raises:
      UserError: the config is invalid, with what to change.
      Stopped: a signal was received; the state is saved.
    """
    started = time.monotonic()
    check_name(workdir)
    experiment = build_experiment(config)
    with lock.locked(workdir):
        with processes.together():
            if processes.is_main():
                open_workdir(workdir, config)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return _train(config, workdir, experiment, checkpoints, started)


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    experiment: Experiment,
    checkpoints: Checkpoints,
    started: float,
) -> dict[str, Any]:
    """Trains in a workdir that is locked."""
    topology, dataset, steps, _, recipe = experiment
    shape = dataset.train.images.shape[1:]
    progress = Progress()
    found = checkpoints.restore(abstract_state(recipe, shape, topology.mesh))
    if found:
        state, progress = found
        summary = processes.from_main(lambda: read_summary(workdir))
        done = progress.epoch * steps + progress.batch
        if done >= config.epochs * steps and summary:
            return summary
    else:
        state = init_state(recipe, shape, topology.mesh)
    timer = Timer()
    kind = Report if processes.is_main() else NullReport
    profile = config.profile and processes.is_main()
    with (
        kind(
            workdir,
            epochs=config.epochs,
            images_per_epoch=steps * config.batch_size,
            done=progress.epoch,
        ) as report,
        Interrupt(jax.process_count()) as interrupt,
        Trace(workdir / "profile" if profile else None, report.say) as trace,
    ):
        report.say(headline(config, experiment, state.params, progress))
        loop = _Loop(
            config, experiment, report, checkpoints, timer, interrupt, trace
        )
        for epoch in range(progress.epoch, config.epochs):
            state, record = loop.epoch(state, progress)
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
            extra = evaluate_average(config, experiment, state, loop.test)
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

    return processes.from_main(summary)


class _Loop:
    """Runs epochs of training and testing."""

    def __init__(
        self,
        config: ConfigDict,
        experiment: Experiment,
        report: Report,
        checkpoints: Checkpoints,
        timer: Timer,
        interrupt: Interrupt,
        trace: Trace,
    ):
        self._config = config
        self._experiment = experiment
        self._report = report
        self._checkpoints = checkpoints
        self._timer = timer
        self._interrupt = interrupt
        self._trace = trace
        topology = experiment.topology
        self._train_steps: dict[
            int, Any
        ] = {}  # by number of batches per dispatch
        self._test_step = make_test_step(experiment.recipe, topology.mesh)
        # The last batch is padded anyway; round up to the devices.
        size = min(config.test_batch_size, len(experiment.dataset.test.labels))
        self._test_batch_size = topology.padded(size)
        self._remaining_time = RemainingTime(
            report, config.epochs * experiment.steps
        )

    def epoch(
        self, state: TrainState, progress: Progress
    ) -> tuple[TrainState, dict[str, float]]:
        """Finishes an epoch and tests; returns the state and a record.

        Raises:
          Stopped: a signal was received; the state is saved.
          UserError: the loss or a gradient is not finite.
        """
        config, (topology, dataset, *_) = self._config, self._experiment
        size, epoch = config.batch_size, progress.epoch
        meter = Meter(progress.sums)
        batch_number, images = progress.batch, 0
        started = time.monotonic()
        batches = data.train_batches(
            dataset.train,
            size,
            seed=config.seed,
            epoch=epoch,
            start=progress.batch,
            rows=topology.rows(size),
        )
        together = data.stack_batches(batches, config.steps_per_dispatch)
        for count, rows in prefetch(together, self._timer):
            state = self._dispatch(state, count, rows, epoch, meter)
            self._interrupt.unsaved(True)
            self._check(meter, state, epoch)
            batch_number += count
            watchdog.beat(f"training in epoch {epoch + 1}")
            images += count * size
            self._report.advance(count * size)
            done = epoch * self._experiment.steps + batch_number
            self._remaining_time.step(done)
            self._maybe_save(
                state, Progress(epoch, batch_number), meter, done, count
            )
        with self._timer.measure("steps"):
            train_loss, train_accuracy = meter.means()
        self._check(meter, state, epoch)
        seconds = time.monotonic() - started
        step = int(state.step)
        with self._timer.measure("test"):
            test_loss, test_accuracy = self.test(
                state.params, state.batch_stats
            )
        return state, {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": float(self._experiment.schedule(step - 1)),
            "images_per_second": images / seconds if images else 0.0,
            "skipped": meter.nonfinite,
        }

    def _dispatch(
        self, state: TrainState, count: int, rows: Any, epoch: int, meter: Meter
    ) -> TrainState:
        """Dispatches training steps on one batch or on stacked batches."""
        topology, size = self._experiment.topology, self._config.batch_size
        first = count not in self._train_steps
        if first:
            self._train_steps[count] = make_train_step(
                self._experiment.recipe, topology.mesh, steps=count
            )
        with (
            self._timer.measure("compile" if first else "steps"),
            self._trace.step(meter.sums),
        ):
            batch = topology.put(rows, size, stacked=count > 1)
            state, sums = self._train_steps[count](state, batch, epoch)
            meter.add(sums)
        return state

    def test(self, params: Any, batch_stats: Any) -> tuple[float, float]:
        """Returns mean loss and accuracy on the test split."""
        meter = Meter()
        topology, size = self._experiment.topology, self._test_batch_size
        for rows in data.test_batches(
            self._experiment.dataset.test, size, rows=topology.rows(size)
        ):
            watchdog.beat("testing")
            batch = topology.put(rows, size)
            meter.add(self._test_step(params, batch_stats, batch))
        return meter.means()

    def _maybe_save(
        self,
        state: TrainState,
        progress: Progress,
        meter: Meter,
        done: int,
        count: int,
    ) -> None:
        """Saves a checkpoint if one is due or a signal was received."""
        every = self._config.checkpoint_every
        due = every and done // every > (done - count) // every
        # A collective decision: every process must call it every time.
        stop = self._checkpoints.preempted() or self._interrupt.requested
        if not stop and not due:
            return
        if progress.batch == self._experiment.steps and not stop:
            return  # saved after testing
        with self._timer.measure("steps"):
            sums = meter.sums()
        self._check(meter, state, progress.epoch)
        with self._timer.measure("save"):
            self._checkpoints.save(state, progress._replace(sums=sums))
            if stop:
                self._checkpoints.wait()
        if stop:
            raise Stopped(
                f"Stopped and saved at step {done}; rerun the same command to "
                "resume.",
                self._interrupt.code,
            )

    def _check(self, meter: Meter, state: TrainState, epoch: int) -> None:
        """Raises if a completed step was not finite and the config says stop."""
        config = self._config
        if not meter.nonfinite or config.on_nonfinite != "stop":
            return
        newest = self._checkpoints.newest
        raise UserError(
            f"{describe_nonfinite(config, self._experiment, state, epoch)} The last good "
            "checkpoint is "
            f"{'of step ' + str(newest) if newest is not None else 'none yet'}."
            f" Lower learning_rate, now {config.learning_rate}, raise "
            "warmup_epochs, or set on_nonfinite=skip."
        )
