# ruff: noqa: E402
"""Diagnoses the batch norm layers of a run: python -m train.doctor RUN.

Prints a table of the layers with warnings and plots it to RUN/doctor.png. Reads
training batches, augmented as in the run.
"""

from __future__ import annotations

from train import clock, signals

if __name__ == "__main__":
    # Before the imports, which take seconds.
    signals.exit_on_ctrl_c("train.doctor")
    clock.start("importing")

import itertools
import pathlib
from collections.abc import Iterator

import jax
import matplotlib
import numpy as np

from jaxbn import doctor
from train import batching, cli
from train.files import as_user_error, atomic_write
from train.step import augmented_images
from train.trained_run import TrainedRun, load_run, use_devices

# How to read it, after the legend of the table.
_PICTURE = """\
doctor.png, layers from left to right in the order of the network:
- top: z of the table; near 0 the running mean is that of the data. A median
  far from 0 has not converged, or is of other data.
- middle: gap and noise of the table (noise as "with exact statistics"). What
  the gap exceeds the noise by comes from the running statistics.
- bottom: |scale| of the channels; box: quartiles, line: median. Channels near 0
  pass nothing on."""

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def examine(
    run: pathlib.Path, batches: int, *, data_dir: str | None = None
) -> doctor.Report:
    """Prints the report on a run and plots it to doctor.png.

    Args:
      run: the workdir.
      batches: number of batches to read.
      data_dir: TFDS data directory; None uses that of the run, see
        `train.trained_run.load_run`.

    Raises:
      UserError: run has no checkpoint, or cannot be written to.
    """
    with clock.show(f"loading {run}"):
        saved = load_run(run, data_dir=data_dir)
    with clock.show(f"examining {batches} batches"):
        report = doctor.examine(
            saved.experiment.recipe.model,
            saved.state.variables,
            itertools.islice(_images(saved), batches),
            devices=saved.experiment.topology.mesh.size,
            quiet=True,
        )
    print(report)
    with as_user_error(run):
        draw(report, run / "doctor.png")
    return report


def _images(saved: TrainedRun) -> Iterator[jax.Array]:
    """Yields batches of augmented images of the last epoch."""
    config, epoch = saved.config, max(saved.progress.epoch - 1, 0)
    recipe = saved.experiment.recipe
    augment = jax.jit(
        lambda batch: augmented_images(
            recipe, batch, seed=config.seed, epoch=epoch
        )
    )
    for batch in batching.train_batches(
        saved.experiment.dataset.train,
        config.batch_size,
        seed=config.seed,
        epoch=epoch,
    ):
        yield augment(batch)


def draw(report: doctor.Report, path: pathlib.Path) -> None:
    """Plots the statistics of each layer against those of the data."""
    layers = report.layers
    positions = np.arange(len(layers))
    figure, axes = plt.subplots(
        3, 1, figsize=(max(6, 0.3 * len(layers) + 2), 8), sharex=True
    )
    shift, noise, scale = axes
    worst = [float(np.max(layer.z)) for layer in layers]
    middle = [float(np.median(layer.z)) for layer in layers]
    shift.bar(positions, worst, color="C0", label="worst channel")
    shift.bar(positions, middle, color="C1", label="median channel")
    shift.set_ylabel("|running mean - mean| / std")
    shift.legend()
    shift.set_title("Running statistics against those of the data")
    noise.plot(positions, [layer.gap for layer in layers], "o-", label="gap")
    noise.plot(
        positions,
        [layer.noise for layer in layers],
        ".--",
        label="with exact statistics",
    )
    noise.set_ylabel("training - inference (std)")
    noise.legend()
    kept = [
        np.abs(np.ones(1) if layer.scale is None else layer.scale)
        for layer in layers
    ]
    scale.boxplot(kept, positions=positions, manage_ticks=False)
    scale.set_ylabel("|scale|")
    scale.set_xticks(positions, [layer.path for layer in layers], rotation=90)
    figure.tight_layout()
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120)
    finally:
        plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(
        "python -m train.doctor", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("run", type=cli.folder, help="the --workdir of a run")
    parser.add_argument(
        "--batches",
        type=int,
        default=20,
        help="number of batches to read; default 20",
    )
    parser.add_argument(
        "--data_dir",
        help="TFDS data directory; default: that of the run, if prepared",
    )
    given = parser.parse_args(arguments)
    if given.batches < 1:
        parser.error(f"--batches must be at least 1; got {given.batches}")
    use_devices(given.run)
    examine(given.run, given.batches, data_dir=given.data_dir)
    print(f"\n{_PICTURE}\nWrote {given.run / 'doctor.png'}.")


if __name__ == "__main__":
    cli.run("train.doctor", main)
