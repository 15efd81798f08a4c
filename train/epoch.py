"""Runs the steps of an epoch, with checkpoints and error checks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from train import Stopped, UserError, watchdog
from train.checkpoint import Checkpoints, Progress
from train.meter import Meter
from train.nonfinite import describe_nonfinite
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
        # Since the last record.
        self._images = self._skipped = 0
        self._since = self.tested_at = time.monotonic()  # end of the last test

    def epoch(
        self, state: TrainState, progress: Progress, *, test: bool
    ) -> tuple[TrainState, dict[str, float] | None]:
        """Finishes an epoch; returns the state, and a record if it is tested.

        Without a test, the host does not wait for the devices.

        Raises:
          Stopped: a signal was received; the state is saved.
          UserError: the loss or a gradient is not finite.
        """
        if not self._images:  # after a record
            self._since = time.monotonic()
        epoch, steps = progress.epoch, self._experiment.steps
        batch = progress.batch
        meter = Meter(
            progress.sums,
            step=epoch * steps.per_epoch + batch,
            fetched=self._report.step,
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
            self._interrupt.unsaved(True)
            if self._unread is not None:
                self._read(*self._unread, state)
                self._skipped += self._unread[0].nonfinite
                self._unread = None
            self._check(meter, state, epoch)
            batch += num_batches
            watchdog.beat(f"training in epoch {epoch + 1}")
            self._images += num_batches * self._config.batch_size
            self._report.advance(num_batches * self._config.batch_size)
            done = epoch * steps.per_epoch + batch
            self._remaining_time.step(done)
            self._maybe_save(
                state,
                Progress(epoch, batch),
                meter,
                done,
                num_batches,
                test=test,
            )
        if not test:
            self._unread = meter, epoch
            return state, None
        train_loss, train_accuracy = self._read(meter, epoch, state)
        seconds = time.monotonic() - self._since
        step = int(state.step)
        with self._timer.measure("test"), self._report.clock("testing"):
            tested = self.test(state.variables)
        self.tested_at = time.monotonic()
        record = {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            **tested,
            "learning_rate": float(self._experiment.schedule(step - 1)),
            "images_per_second": self._images / seconds,
            "skipped": self._skipped + meter.nonfinite,
        }
        self._images = self._skipped = 0
        return state, record

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
        done: int,
        num_batches: int,
        *,
        test: bool,
    ) -> None:
        """Saves a checkpoint if one is due or a signal was received."""
        every = self._config.checkpoint_every
        due = every and done // every > (done - num_batches) // every
        # A collective decision: every process must call it every time.
        stop = self._checkpoints.preempted() or self._interrupt.requested
        if not stop and not due:
            return
        ended = progress.batch == self._experiment.steps.of(progress.epoch)
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
        config = self._config
        if not meter.nonfinite or config.on_nonfinite != "stop":
            return
        newest = self._checkpoints.newest
        where = describe_nonfinite(config, self._experiment, state, epoch)
        raise UserError(
            f"{where} The last good checkpoint is "
            f"{'of step ' + str(newest) if newest is not None else 'none yet'}."
            f" Lower learning_rate, now {config.learning_rate}, raise "
            "warmup_epochs, or set on_nonfinite=skip."
        )
