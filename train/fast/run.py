"""Trains and times several seeds of a fast run."""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from train import UserError
from train.fast.programs import Programs, compile_programs, epochs
from train.fast.recipe import Experiment, Recipe, build_experiment
from train.files import as_user_error, write_json
from train.output import say
from train.summary import versions
from train.workdir import open_workdir, read_summary

CPU_NOTE = "Running on CPU: accuracies are valid, times and images/s are not."

_TIMED = (
    "initialization, the first layer from the data, all steps, and evaluation "
    "on all views of the test images; excludes reading the data, moving it to "
    "the device, and compilation"
)


# The keys of summary.json that `table` reads.
_SHOWN = (
    *("test_accuracy", "test_accuracy_deviation"),
    *("test_accuracy_augmented", "test_accuracy_augmented_deviation"),
    *("seconds", "seconds_deviation", "images_per_second", "versions"),
    *("seeds", "devices", "device_kind", "on_accelerator"),
)


class Run(NamedTuple):
    """Result of one seed."""

    seed: int
    accuracy: float  # test accuracy without augmentation
    tta_accuracy: float  # with test-time augmentation
    loss: float  # nats, mean over the last epoch
    seconds: float  # as in summary.json's "timed"


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all seeds, printing a line for each, and writes summary.json.

    If the workdir has results of the same seeds, returns those.

    Raises:
      UserError: the config is invalid, or workdir holds another run.
    """
    experiment = build_experiment(config)
    open_workdir(workdir, config)
    before = read_summary(workdir)
    if before.get("seeds") == [*_seeds(config)]:
        if not {*_SHOWN} <= {*before}:
            raise UserError(
                f"{workdir / 'summary.json'} is damaged. Remove it, and rerun "
                "the same command to rewrite it."
            )
        say(table(before))  # already finished
        return before
    on_cpu = jax.default_backend() == "cpu"
    scan = not on_cpu if config.scan is None else config.scan
    say(_headline(config, experiment))
    if on_cpu:
        say(CPU_NOTE)

    started = time.perf_counter()
    recipe = experiment.recipe
    programs = compile_programs(
        recipe, experiment.dataset, experiment.topology.mesh, scan=scan
    )
    if not on_cpu:
        # Excludes setup at the first call of a program.
        run(programs, experiment, config.seed - 1)
    compile_seconds = time.perf_counter() - started
    say(f"compiled in {compile_seconds:.1f} s")

    runs = []
    for seed in _seeds(config):
        runs.append(run(programs, experiment, seed))
        say(_line(runs[-1], recipe))
    summary = summarize(runs, config, experiment, compile_seconds)
    with as_user_error(workdir):
        write_json(workdir / "summary.json", summary)
    say(table(summary))
    return summary


def _seeds(config: ConfigDict) -> range:
    return range(config.seed, config.seed + config.seeds)


def run(programs: Programs, experiment: Experiment, seed: int) -> Run:
    """Trains, evaluates and times one seed."""
    recipe = experiment.recipe
    report_losses = (
        jax.default_backend() == "cpu"
    )  # times are not valid there anyway
    started = time.perf_counter()
    state = programs.init(seed)
    losses: Sequence[jax.Array] = ()
    total = epochs(recipe)
    for epoch in range(total):
        state, losses = programs.epoch(state, seed, epoch)
        if report_losses:
            loss = float(np.mean(jax.device_get(losses)))
            say(f"  epoch {epoch + 1}/{total}  train loss {loss:.4f}")
    correct = jax.block_until_ready(programs.evaluate(state))
    seconds = time.perf_counter() - started
    images = len(experiment.dataset.test.labels)
    return Run(
        seed=seed,
        accuracy=int(correct.single_view) / images,
        tta_accuracy=int(correct.multi_view) / images,
        loss=float(np.mean(jax.device_get(losses))),
        seconds=seconds,
    )


def summarize(
    runs: Sequence[Run],
    config: ConfigDict,
    experiment: Experiment,
    compile_seconds: float,
) -> dict[str, Any]:
    """Returns the contents of summary.json; deviations have ddof=1."""
    recipe, mesh = experiment.recipe, experiment.topology.mesh
    device = mesh.devices.flat[0]
    summary: dict[str, Any] = {"seeds": [each.seed for each in runs]}
    for name, field in (
        ("test_accuracy", "accuracy"),
        ("test_accuracy_augmented", "tta_accuracy"),
        ("train_loss", "loss"),
        ("seconds", "seconds"),
    ):
        values = [getattr(each, field) for each in runs]
        summary[name] = statistics.fmean(values)
        summary[f"{name}_deviation"] = (
            statistics.stdev(values) if len(values) > 1 else None
        )
        summary[f"{name}_of_seeds"] = values
    trained = recipe.steps * recipe.batch_size
    return {
        **summary,
        "images_per_second": trained / summary["seconds"],
        "timed": _TIMED,
        "on_accelerator": device.platform != "cpu",
        "compile_seconds": compile_seconds,
        "epochs": config.epochs,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "devices": mesh.size,
        "device_kind": device.device_kind,
        "platform_version": device.client.platform_version,
        "versions": versions(),
    }


def table(summary: dict[str, Any]) -> str:
    """Formats the results as a text table."""

    def row(title: str, key: str, form: str) -> str:
        deviation = summary[f"{key}_deviation"]
        spread = "-" if deviation is None else format(deviation, form)
        return f"{title:<38}{summary[key]:>10{form}}{spread:>12}"

    versions = summary["versions"]
    seeds = len(summary["seeds"])
    heading = f"{seeds} seed{'s' * (seeds > 1)}"
    return "\n".join(
        (
            f"{heading:<38}{'mean':>10}{'deviation':>12}",
            row("test accuracy, one view", "test_accuracy", ".2%"),
            row(
                "test accuracy, test-time augmentation",
                "test_accuracy_augmented",
                ".2%",
            ),
            row("seconds, training and evaluation", "seconds", ".3f"),
            f"{'images/s':<38}{summary['images_per_second']:>10,.0f}",
            f"{summary['devices']} x {summary['device_kind']}, "
            + ", ".join(f"{name} {of}" for name, of in versions.items()),
            *(() if summary["on_accelerator"] else (CPU_NOTE,)),
        )
    )


def _headline(config: ConfigDict, experiment: Experiment) -> str:
    recipe, dataset = experiment.recipe, experiment.dataset
    mesh = experiment.topology.mesh
    widths = "/".join(map(str, config.widths))
    return (
        f"FastNet {widths}, {config.layers} layers per block, {config.dtype}, on "
        f"{config.dataset}: {len(dataset.train.labels)} training and "
        f"{len(dataset.test.labels)} test images, batch {config.batch_size}, "
        f"{config.epochs:g} epochs ({recipe.steps} steps), {config.optimizer}, "
        f"norm {config.norm}, on {mesh.size} {mesh.devices.flat[0].device_kind}"
    )


def _line(each: Run, recipe: Recipe) -> str:
    speed = recipe.steps * recipe.batch_size / each.seconds
    return (
        f"seed {each.seed}  test accuracy {each.accuracy:.2%}, augmented "
        f"{each.tta_accuracy:.2%}  train loss {each.loss:.4f}  "
        f"{each.seconds:.3f} s  {speed:,.0f} images/s"
    )
