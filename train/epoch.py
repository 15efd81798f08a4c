"""Runs the steps of an epoch, with checkpoints and error checks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from train import Stopped, watchdog
from train.checkpoint import Checkpoints, Progress
from train.checkpoint_errors import with_resume_hint
from train.duration import tested_epochs
from train.meter import Meter
from train.nonfinite import nonfinite_error
from train.pipeline import Feed
from train.report import Report
from train.session import Session
from train.signals import Interrupt
from train.state import Sums, TrainState
from train.summary import RemainingTime
from train.timing import Timer
from train.trace import Trace


class EpochRunner:
    """Runs epochs of training and testing."""

    def __init__(
        self,
        config: ConfigDict,
        session: Session,
        report: Report,
        checkpoints: Checkpoints,
        timer: Timer,
        interrupt: Interrupt,
        trace: Trace,
    ):
        self._config = config
        self._experiment = session.experiment
        self._pipeline = session.pipeline
        self._programs = session.programs
        self._report = report
        self._checkpoints = checkpoints
        self._timer = timer
        self._interrupt = interrupt
        self._trace = trace
        self._remaining_time = RemainingTime(report, session.experiment.steps)
        # Sums of the last epoch that was not tested, and its number.
        self._unread: tuple[Meter, int] | None = None
        self._images = 0  # since the last record
        self._since = self._began = time.monotonic()
        # From the creation to the end of the last test, without saving.
        self.seconds = 0.0

    def run(self, state: TrainState, progress: Progress) -> TrainState:
        """Trains from a position to the end, with records and checkpoints.

        Raises:
          Stopped: a signal was received; the state is saved.
          UserError: the loss or a gradient is not finite, or a file cannot be
            written.
        """
        tested = tested_epochs(self._config)
        for epoch in range(progress.epoch, self._experiment.steps.epochs):
            state, record = self._epoch(
                state, progress, test=epoch + 1 in tested
            )
            progress = Progress(epoch + 1)
            if record is not None:
                self._save_tested(state, progress, record)
        with self._timer.measure("save"):
            self._checkpoints.wait()
        self._interrupt.set_unsaved(False)
        return state

    def _save_tested(
        self, state: TrainState, progress: Progress, record: dict[str, float]
    ) -> None:
        """Writes the record of an epoch, then its checkpoint."""
        with self._timer.measure("save"):
            # At most one record may be ahead of the checkpoints.
            self._checkpoints.wait()
            with with_resume_hint(
                self._report.workdir, lambda: self._checkpoints.newest
            ):
                self._report.add(record)
            self._checkpoints.save(
                state, progress, test_accuracy=record["test_accuracy"]
            )

    def _epoch(
        self, state: TrainState, progress: Progress, *, test: bool
    ) -> tuple[TrainState, dict[str, float] | None]:
        """Finishes an epoch; returns the state, and a record if it is tested.

        Without a test, the host does not wait for the devices.
        """
        if not self._images:  # after a record
            self._since = time.monotonic()
        epoch, batch, sums = progress
        steps = self._experiment.steps
        meter = Meter(
            sums, step=steps.before(epoch, batch), fetched=self._fetched
        )
        feeds = self._pipeline.train_feeds(
            seed=self._config.seed,
            epoch=epoch,
            start=batch,
            stop=steps.of(epoch),
            timer=self._timer,
        )
        for num_batches, feed in feeds:
            state = self._dispatch(state, num_batches, feed, epoch, meter)
            batch += num_batches
            self._interrupt.set_unsaved(True)
            if self._unread is not None:
                self._read(*self._unread, state)
                self._unread = None
            self._check(meter, state, epoch)
            watchdog.beat(f"training in epoch {epoch + 1}")
            self._images += num_batches * self._config.batch_size
            self._report.advance(num_batches * self._config.batch_size)
            self._maybe_save(
                state, Progress(epoch, batch), meter, num_batches, test=test
            )
        if not test:
            self._unread = meter, epoch
            return state, None
        return state, self._record(meter, epoch, state)

    def _fetched(self, step: int, sums: Sums) -> None:
        """Reports steps that the devices have completed."""
        self._report.step(step, sums)
        self._remaining_time.step(step)

    def _record(
        self, meter: Meter, epoch: int, state: TrainState
    ) -> dict[str, float]:
        """Tests after an epoch; returns its record."""
        train_loss, train_accuracy = self._read(meter, epoch, state)
        speed = {}
        if self._images:  # none if the run was resumed at the end of the epoch
            seconds = time.monotonic() - self._since
            speed = {"images_per_second": self._images / seconds}
        self._images = 0
        step, skipped = int(state.step), int(state.skipped)
        for record in self._report.records:
            skipped -= int(record.get("skipped", 0))
        with self._timer.measure("test"), self._report.clock("testing"):
            tested = self.test(state.variables)
        saving = self._timer.spent("save")
        self.seconds = time.monotonic() - self._began - saving
        return {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            **tested,
            "learning_rate": float(self._experiment.schedule(step - 1)),
            **speed,
            "skipped": skipped,
        }

    def test(self, variables: dict[str, Any]) -> dict[str, float]:
        """Returns loss and accuracy on the test split, by record key."""
        meter = Meter()
        for num_batches, feed in self._pipeline.test_feeds():
            watchdog.beat("testing")
            meter.add(self._programs.test(num_batches)(variables, feed))
        loss, accuracy = meter.means()
        tested = {"test_loss": loss, "test_accuracy": accuracy}
        if self._experiment.recipe.test_time_augmentation:
            sums = Sums(*meter.sums())
            tested["test_accuracy_augmented"] = sums.augmented / sums.count
        return tested

    def _dispatch(
        self,
        state: TrainState,
        num_batches: int,
        feed: Feed,
        epoch: int,
        meter: Meter,
    ) -> TrainState:
        """Dispatches training steps on some batches."""
        phase = self._experiment.recipe.phase(epoch)
        program = self._programs.train(num_batches, phase)
        with self._timer.measure("steps"), self._trace.step(meter.sums):
            seed, number = np.int32(self._config.seed), np.int32(epoch)
            state, sums = program(state, feed, seed, number)
            meter.add(sums, num_batches)
        return state

    def _read(
        self, meter: Meter, epoch: int, state: TrainState
    ) -> tuple[float, float]:
        """Waits for the steps of an epoch; returns mean loss and accuracy."""
        with self._timer.measure("steps"):
            means = meter.means()
        self._check(meter, state, epoch)
        return means

    def _maybe_save(
        self,
        state: TrainState,
        progress: Progress,
        meter: Meter,
        num_batches: int,
        *,
        test: bool,
    ) -> None:
        """Saves a checkpoint if one is due or a signal was received."""
        steps, every = self._experiment.steps, self._config.checkpoint_every
        done = steps.before(progress.epoch, progress.batch)
        due = every and done // every > (done - num_batches) // every
        # A collective decision: every process must call it every time.
        stop = self._checkpoints.preempted() or self._interrupt.requested
        if not stop and not due:
            return
        ended = progress.batch == steps.of(progress.epoch)
        if ended and test and not stop:
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
                f"Stopped and saved at step {done}; rerun the same command "
                f"with --workdir={self._report.workdir} to resume.",
                self._interrupt.code,
            )

    def _check(self, meter: Meter, state: TrainState, epoch: int) -> None:
        """Raises if a completed step was not finite, and it is to stop."""
        if meter.nonfinite and self._config.on_nonfinite == "stop":
            newest = self._checkpoints.newest
            raise nonfinite_error(
                self._config, self._experiment, state, epoch, newest=newest
            )
