"""A whole run: config in, trained model and records in the workdir out."""

from __future__ import annotations

import collections
import difflib
import importlib.metadata
import pathlib
import platform
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from train import UserError, data
from train.augment import pixel_statistics
from train.checkpoint import Checkpoints
from train.report import Report, open_workdir, write_json
from train.resnet import ResNet
from train.step import (
    AXIS,
    Recipe,
    Sums,
    TrainState,
    init_state,
    make_optimizer,
    make_test_step,
    make_train_step,
)

# More steps in flight than this gain nothing, and simulated devices that run
# far ahead of each other can wait for ever.
MAX_IN_FLIGHT = 8


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains as config says and returns what stands in summary.json.

    A workdir with the same config is gone on with after its last checkpoint.

    Raises:
      UserError: the config cannot be run, with what to change.
    """
    started = time.monotonic()
    mesh = jax.make_mesh(
        (jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,)
    )
    check(config, mesh.size)
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        train_split=config.train_split,
        test_split=config.test_split,
    )
    steps = len(dataset.train.labels) // config.batch_size
    if not steps:
        raise UserError(
            f"batch_size={config.batch_size} is more than the "
            f"{len(dataset.train.labels)} examples of {config.dataset} "
            f"{config.train_split!r}."
        )
    schedule = make_schedule(config, steps)
    recipe = make_recipe(config, dataset, schedule)
    shape = dataset.train.images.shape[1:]
    open_workdir(workdir, config)

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = init_state(recipe, shape, mesh)
        state, done = checkpoints.restore(state) or (state, 0)
        with Report(
            workdir,
            epochs=config.epochs,
            images_per_epoch=steps * config.batch_size,
            done=done,
        ) as report:
            report.say(_headline(config, dataset, mesh, done))
            loop = _Loop(config, recipe, schedule, dataset, mesh, report)
            for epoch in range(done, config.epochs):
                state, record = loop.epoch(state, epoch)
                report.add(record)
                checkpoints.save(state, epochs=epoch + 1)
            summary = _summary(report.records, mesh, started)
    write_json(workdir / "summary.json", summary)
    return summary


def check(config: ConfigDict, devices: int) -> None:
    """Raises UserError for values that no run can have."""
    positive = ("epochs", "batch_size", "test_batch_size", "learning_rate")
    for key in positive:
        if not config[key] > 0:
            raise UserError(f"{key} must be positive; got {config[key]}.")
    if config.batch_size % devices:
        below = config.batch_size // devices * devices
        nearest = " or ".join(str(n) for n in (below, below + devices) if n)
        raise UserError(
            f"batch_size={config.batch_size} does not split over {devices} "
            f"devices; the nearest that does is {nearest}."
        )
    _one_of("schedule", config.schedule, SCHEDULES)
    _one_of("dtype", config.dtype, ("float32", "bfloat16"))


def _one_of(key: str, value: str, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0)[0]
        raise UserError(
            f"{key}={value!r} is unknown; did you mean {near!r}? Known are "
            f"{', '.join(sorted(known))}."
        )


def _step_schedule(config: ConfigDict, _: int) -> optax.Schedule:
    return optax.piecewise_constant_schedule(
        config.learning_rate, {step: 0.1 for step in config.boundaries}
    )


def _cosine_schedule(config: ConfigDict, total: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, total)


def _one_cycle_schedule(config: ConfigDict, total: int) -> optax.Schedule:
    return optax.cosine_onecycle_schedule(total, config.learning_rate)


SCHEDULES = {
    "step": _step_schedule,
    "cosine": _cosine_schedule,
    "one_cycle": _one_cycle_schedule,
}


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the steps taken before."""
    total = steps_per_epoch * config.epochs
    main = SCHEDULES[config.schedule](config, total)
    warmup = round(config.warmup_epochs * steps_per_epoch)

    def schedule(step: jax.Array) -> jax.Array:
        rise = jnp.minimum((step + 1) / max(warmup, 1), 1) if warmup else 1
        return main(step) * rise

    return schedule


def make_recipe(
    config: ConfigDict, dataset: data.Dataset, schedule: optax.Schedule
) -> Recipe:
    """Returns what the compiled steps are made from."""
    mean, std = pixel_statistics(dataset.train.images)
    return Recipe(
        model=ResNet(
            depth=config.depth,
            num_classes=dataset.num_classes,
            width=config.width,
            norm=config.norm,
            axis_name=AXIS,
            norm_momentum=config.norm_momentum,
            norm_epsilon=config.norm_epsilon,
            zero_init_gamma=config.zero_init_gamma,
            dtype=jnp.dtype(config.dtype),
        ),
        optimizer=make_optimizer(
            schedule,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        ),
        pixel_mean=mean,
        pixel_std=std,
        padding=config.crop_padding,
        flip=config.flip,
        seed=config.seed,
    )


class _Meter:
    """Adds up the sums of steps while it keeps only a few of them in flight."""

    def __init__(self) -> None:
        self._in_flight: collections.deque[Sums] = collections.deque()
        self._total = np.zeros(len(Sums._fields))

    def add(self, sums: Sums) -> None:
        self._in_flight.append(sums)
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._land()

    def _land(self) -> None:
        self._total += np.array(jax.device_get(self._in_flight.popleft()))

    def means(self) -> tuple[float, float]:
        """Waits for all steps; returns mean loss and accuracy."""
        while self._in_flight:
            self._land()
        total = Sums(*self._total)
        return total.loss / total.count, total.correct / total.count


class _Loop:
    """The compiled steps and the data they run on."""

    def __init__(
        self,
        config: ConfigDict,
        recipe: Recipe,
        schedule: optax.Schedule,
        dataset: data.Dataset,
        mesh: Mesh,
        report: Report,
    ):
        self._config = config
        self._schedule = schedule
        self._dataset = dataset
        self._report = report
        self._split = NamedSharding(mesh, P(AXIS))
        self._train_step = make_train_step(recipe, mesh)
        self._test_step = make_test_step(recipe, mesh)
        # The last batch is padded anyway, so any whole share will do.
        size = min(config.test_batch_size, len(dataset.test.labels))
        self._test_batch_size = -(-size // mesh.size) * mesh.size

    def epoch(
        self, state: TrainState, epoch: int
    ) -> tuple[TrainState, dict[str, float]]:
        """Trains one epoch, then measures; returns state and record."""
        meter = _Meter()
        size = self._config.batch_size
        images = 0
        started = time.monotonic()
        for batch in data.train_batches(
            self._dataset.train, size, seed=self._config.seed, epoch=epoch
        ):
            batch = jax.device_put(batch, self._split)
            state, sums = self._train_step(state, batch, epoch)
            meter.add(sums)
            self._report.advance(size)
            images += size
        train_loss, train_accuracy = meter.means()
        seconds = time.monotonic() - started
        step = int(state.step)
        if not np.isfinite(train_loss):
            raise UserError(
                f"The training loss is {train_loss} in epoch {epoch + 1} "
                f"(up to step {step}). Lower learning_rate, now "
                f"{self._config.learning_rate}, or raise warmup_epochs."
            )
        test_loss, test_accuracy = self.test(state)
        return state, {
            "epoch": epoch + 1,
            "step": step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": float(self._schedule(step - 1)),
            "images_per_second": images / seconds,
        }

    def test(self, state: TrainState) -> tuple[float, float]:
        """Mean loss and accuracy on the test split, each example once."""
        meter = _Meter()
        for batch in data.test_batches(
            self._dataset.test, self._test_batch_size
        ):
            batch = jax.device_put(batch, self._split)
            meter.add(self._test_step(state.params, state.batch_stats, batch))
        return meter.means()


def _headline(
    config: ConfigDict, dataset: data.Dataset, mesh: Mesh, done: int
) -> str:
    device = mesh.devices.flat[0]
    goes_on = f", going on after epoch {done}" if done else ""
    return (
        f"ResNet-{config.depth} on {config.dataset}: "
        f"{len(dataset.train.labels)} training and "
        f"{len(dataset.test.labels)} test images, batch {config.batch_size} "
        f"over {mesh.size} {device.device_kind} devices{goes_on}"
    )


def _summary(
    records: list[dict[str, float]], mesh: Mesh, started: float
) -> dict[str, Any]:
    last = records[-1]
    # The first epoch holds the compilation.
    speeds = [record["images_per_second"] for record in records]
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        "seconds": round(time.monotonic() - started, 1),
        "images_per_second": statistics.median(speeds[1:] or speeds),
    }
