"""Runs the steps of an epoch, with checkpoints and error checks."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ml_collections import ConfigDict

from train import (
    Stopped,
    UserError,
    batching,
    watchdog,
)
from train.checkpoint import Checkpoints, Progress
from train.experiment import Experiment
from train.meter import Meter
from train.nonfinite import describe_nonfinite
from train.prefetch import prefetch
from train.report import Report
from train.signals import Interrupt
from train.state import TrainState
from train.step import make_test_step, make_train_step
from train.summary import RemainingTime
from train.timing import Timer
from train.trace import Trace


class EpochRunner:
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
        self._train_steps: dict[int, Any] = {}  # by batches per dispatch
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
        meter = Meter(
            progress.sums,
            step=epoch * self._experiment.steps + progress.batch,
            fetched=self._report.step,
        )
        batch_number, images = progress.batch, 0
        started, compiled = time.monotonic(), self._timer.spent("compile")
        batches = batching.train_batches(
            dataset.train,
            size,
            seed=config.seed,
            epoch=epoch,
            start=progress.batch,
            rows=topology.rows(size),
        )
        together = batching.stack_batches(batches, config.steps_per_dispatch)
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
        seconds -= self._timer.spent("compile") - compiled
        step = int(state.step)
        with self._timer.measure("test"), self._report.clock("testing"):
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
            self._report.clock("compiling", done="compiled")
            if first
            else contextlib.nullcontext(),
            self._timer.measure("compile" if first else "steps"),
            self._trace.step(meter.sums),
        ):
            batch = topology.put(rows, size, stacked=count > 1)
            state, sums = self._train_steps[count](state, batch, epoch)
            meter.add(sums, count)
        return state

    def test(self, params: Any, batch_stats: Any) -> tuple[float, float]:
        """Returns mean loss and accuracy on the test split."""
        meter = Meter()
        topology, size = self._experiment.topology, self._test_batch_size
        for rows in batching.test_batches(
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
