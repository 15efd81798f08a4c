"""A whole run: config in, trained model and records in the workdir out."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from train import Stopped, UserError, data, networks, topology
from train.averaged import evaluate_average
from train.checkpoint import Checkpoints, what_is_left
from train.meter import Meter
from train.norms import examples_together
from train.recipe import check, make_recipe, make_schedule
from train.report import Report, SilentReport, open_workdir, write_json
from train.signals import Interrupt
from train.step import (
    Recipe,
    Sums,
    TrainState,
    abstract_state,
    init_state,
    make_test_step,
    make_train_step,
)
from train.timeline import Timeline, ready
from train.topology import Topology
from train.trace import Trace
from train.trouble import explain


class Prepared(NamedTuple):
    """What a config stands for, before anything is written."""

    place: Topology
    dataset: data.Dataset
    steps: int  # of an epoch
    schedule: optax.Schedule
    recipe: Recipe


class Progress(NamedTuple):
    """Where in the run a state is; kept beside it in a checkpoint."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the next one
    sums: tuple[float, ...] = (0.0,) * len(Sums._fields)  # over these


def prepare(config: ConfigDict) -> Prepared:
    """Reads the data and makes the recipe.

    Raises:
      UserError: the config cannot be run, with what to change.
    """
    check(config)
    place = topology.make(config.mesh, config.batch_size, config.microbatches)
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        train_split=config.train_split,
        test_split=config.test_split,
        lazy=jax.process_count() > 1,
    )
    steps = len(dataset.train.labels) // config.batch_size
    if not steps:
        raise UserError(
            f"batch_size={config.batch_size} is more than the "
            f"{len(dataset.train.labels)} examples of {config.dataset} "
            f"{config.train_split!r}."
        )
    schedule = make_schedule(config, steps)
    recipe = make_recipe(config, dataset, schedule, place)
    return Prepared(place, dataset, steps, schedule, recipe)


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains as config says and returns what stands in summary.json.

    A workdir with the same config is gone on with after its last checkpoint.

    Raises:
      UserError: the config cannot be run, with what to change.
      Stopped: a signal asked for it; the state is saved.
    """
    started = time.monotonic()
    prepared = prepare(config)
    place, dataset, steps, _, recipe = prepared
    with topology.main_first("workdir"):
        open_workdir(workdir, config)
    timeline = Timeline()
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        shape = dataset.train.images.shape[1:]
        progress = Progress()
        found = checkpoints.restore(abstract_state(recipe, shape, place.mesh))
        if found:
            state, kept = found
            progress = Progress(**kept)
        else:
            state = init_state(recipe, shape, place.mesh)
        kind = Report if topology.is_main() else SilentReport
        with (
            kind(
                workdir,
                epochs=config.epochs,
                images_per_epoch=steps * config.batch_size,
                done=progress.epoch,
            ) as report,
            Interrupt() as interrupt,
            Trace(
                workdir / "profile"
                if config.profile and topology.is_main()
                else None,
                report.say,
            ) as trace,
        ):
            report.say(headline(config, prepared, state, progress))
            loop = _Loop(
                config,
                prepared,
                report,
                checkpoints,
                timeline,
                interrupt,
                trace,
            )
            for epoch in range(progress.epoch, config.epochs):
                state, record = loop.epoch(state, progress)
                try:
                    report.add(record)
                except OSError as error:
                    raise UserError(
                        f"Cannot write to {workdir}: {error.strerror}. "
                        f"{what_is_left(checkpoints.newest)}"
                    ) from error
                progress = Progress(epoch + 1)
                with timeline.of("save"):
                    checkpoints.save(
                        state,
                        progress._asdict(),
                        test_accuracy=record["test_accuracy"],
                    )
            extra = {}
            if state.average is not None:
                extra = evaluate_average(config, prepared, state, loop.test)
            with timeline.of("save"):
                checkpoints.wait()
            summary = _summary(report.records, prepared, started, timeline)
            summary |= extra
            if topology.is_main():
                write_json(workdir / "summary.json", summary)
            report.say(f"time: {timeline}")
    return summary


class _Loop:
    """The compiled steps and the data they run on."""

    def __init__(
        self,
        config: ConfigDict,
        prepared: Prepared,
        report: Report,
        checkpoints: Checkpoints,
        timeline: Timeline,
        interrupt: Interrupt,
        trace: Trace,
    ):
        self._config = config
        self._prepared = prepared
        self._report = report
        self._checkpoints = checkpoints
        self._timeline = timeline
        self._interrupt = interrupt
        self._trace = trace
        place = prepared.place
        self._train_steps: dict[int, Any] = {}  # by batches of a dispatch
        self._test_step = make_test_step(prepared.recipe, place.mesh)
        # The last batch is padded anyway, so any whole share will do.
        devices = place.mesh.size
        size = min(config.test_batch_size, len(prepared.dataset.test.labels))
        self._test_batch_size = -(-size // devices) * devices
        self._forecast = _Forecast(report, config.epochs * prepared.steps)

    def epoch(
        self, state: TrainState, progress: Progress
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains the rest of an epoch, then measures; state and record.

        Raises:
          Stopped: a signal asked for it; the state is saved.
          UserError: the loss or a gradient is not finite.
        """
        config, (place, dataset, *_) = self._config, self._prepared
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
            rows=place.rows(size),
        )
        together = data.stacked(batches, config.steps_per_dispatch)
        for count, rows in ready(together, self._timeline):
            state = self._dispatch(state, count, rows, epoch, meter)
            if meter.nonfinite and config.on_nonfinite == "stop":
                self._fail(state, epoch)
            batch_number += count
            images += count * size
            self._report.advance(count * size)
            done = epoch * self._prepared.steps + batch_number
            self._forecast.step(done)
            self._maybe_save(
                state, Progress(epoch, batch_number), meter, done, count
            )
        with self._timeline.of("steps"):
            train_loss, train_accuracy = meter.means()
        if meter.nonfinite and config.on_nonfinite == "stop":
            self._fail(state, epoch)
        seconds = time.monotonic() - started
        step = int(state.step)
        with self._timeline.of("test"):
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
            "learning_rate": float(self._prepared.schedule(step - 1)),
            "images_per_second": images / seconds if images else 0.0,
            "skipped": meter.nonfinite,
        }

    def _dispatch(
        self, state: TrainState, count: int, rows: Any, epoch: int, meter: Meter
    ) -> TrainState:
        """Starts the steps on some batches, stacked if they are several."""
        place, size = self._prepared.place, self._config.batch_size
        first = count not in self._train_steps
        if first:
            self._train_steps[count] = make_train_step(
                self._prepared.recipe, place.mesh, steps=count
            )
        with (
            self._timeline.of("compile" if first else "steps"),
            self._trace.step(meter.sums),
        ):
            batch = place.put(rows, size, stacked=count > 1)
            state, sums = self._train_steps[count](state, batch, epoch)
            meter.add(sums)
        return state

    def test(self, params: Any, batch_stats: Any) -> tuple[float, float]:
        """Mean loss and accuracy on the test split, each example once."""
        meter = Meter()
        place, size = self._prepared.place, self._test_batch_size
        for rows in data.test_batches(
            self._prepared.dataset.test, size, rows=place.rows(size)
        ):
            batch = place.put(rows, size)
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
        """Saves where the config asks for it, or a signal does."""
        every = self._config.checkpoint_every
        due = every and done // every > (done - count) // every
        # All processes ask each time, and all get the same answer.
        stop = self._checkpoints.preempted() or self._interrupt.asked
        if not stop and not due:
            return
        if progress.batch == self._prepared.steps and not stop:
            return  # the end of the epoch is saved with its test
        with self._timeline.of("steps"):
            sums = meter.sums()
        if meter.nonfinite and self._config.on_nonfinite == "stop":
            self._fail(state, progress.epoch)
        with self._timeline.of("save"):
            self._checkpoints.save(
                state, progress._replace(sums=sums)._asdict()
            )
            if stop:
                self._checkpoints.wait()
        if stop:
            raise Stopped(
                f"Stopped and saved at step {done}; the same command goes on "
                "from there."
            )

    def _fail(self, state: TrainState, epoch: int) -> None:
        where = explain(self._config, self._prepared, state, epoch)
        newest = self._checkpoints.newest
        raise UserError(
            f"{where} The last good checkpoint is "
            f"{'of step ' + str(newest) if newest is not None else 'none yet'}."
            f" Lower learning_rate, now {self._config.learning_rate}, raise "
            "warmup_epochs, or set on_nonfinite=skip."
        )


class _Forecast:
    """Says once when the run will be over."""

    BEGIN, END = 3, 13  # of the steps it measures; the first ones compile

    def __init__(self, report: Report, total: int):
        self._report, self._total = report, total
        self._seen, self._started = 0, 0.0

    def step(self, done: int) -> None:
        self._seen += 1
        if self._seen == self.BEGIN:
            self._started = time.monotonic()
        if self._seen == self.END:
            each = (time.monotonic() - self._started) / (self.END - self.BEGIN)
            left = each * (self._total - done)
            if left > 60:
                end = time.strftime("%H:%M", time.localtime(time.time() + left))
                self._report.say(
                    f"about {left / 60:.0f} min to go, until {end}"
                )


def headline(
    config: ConfigDict, prepared: Prepared, state: TrainState, done: Progress
) -> str:
    """Returns what the run is, in a line."""
    place, dataset = prepared.place, prepared.dataset
    device = place.mesh.devices.flat[0]
    shape = " x ".join(f"{k}={v}" for k, v in place.mesh.shape.items())
    processes = jax.process_count()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    goes_on = ""
    if done.batch:
        goes_on = f", going on in epoch {done.epoch + 1}"
    elif done.epoch:
        goes_on = f", going on after epoch {done.epoch}"
    return (
        f"{networks.title(config)} ({parameters:,} parameters) on "
        f"{config.dataset}: {len(dataset.train.labels)} training and "
        f"{len(dataset.test.labels)} test images, batch {config.batch_size} "
        f"over {place.mesh.size} {device.device_kind} devices ({shape}"
        f"{f', {processes} processes' if processes > 1 else ''}), "
        f"norm {config.norm}, {examples_together(config, place)}{goes_on}"
    )


def _summary(
    records: list[dict[str, float]],
    prepared: Prepared,
    started: float,
    timeline: Timeline,
) -> dict[str, Any]:
    last = records[-1]
    mesh = prepared.place.mesh
    # The first epoch holds the compilation.
    speeds = [record["images_per_second"] for record in records]
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "devices": mesh.size,
        "processes": jax.process_count(),
        "device_kind": mesh.devices.flat[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        "seconds": round(time.monotonic() - started, 1),
        "images_per_second": statistics.median(speeds[1:] or speeds),
        "time": {k: round(v, 4) for k, v in timeline.shares().items()},
    }
