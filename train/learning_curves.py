"""Plots the learning curves of a run, and of groups of runs."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np

from train import UserError
from train.files import as_user_error, atomic_write
from train.run_groups import Group

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


def draw_run(
    records: list[dict[str, float]], path: pathlib.Path, title: str = ""
) -> None:
    """Plots loss and accuracy of a run over epochs to a PNG.

    Args:
      records: records of all epochs.
      path: the PNG.
      title: such as "ResNet-20 on cifar10".

    Raises:
      OSError: path cannot be written.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for axis, key, unit, form, label in zip(
        axes,
        ("loss", "accuracy"),
        (1, 100),
        ("{:.4f}", "{:.2f}%"),
        ("loss (nats)", "accuracy (%)"),
    ):
        _run_curves(axis, records, key, unit, form)
        axis.set(xlabel="epoch", ylabel=label)
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
    finally:
        plt.close(figure)


def _run_curves(
    axis: plt.Axes,
    records: list[dict[str, float]],
    key: str,
    unit: float,
    form: str,
) -> None:
    """Plots a metric in training and on the test split, with its last value."""
    epochs = [record["epoch"] for record in records]
    marker = "." if len(epochs) < 30 else ""
    for split, color in (("train", "C0"), ("test", "C1")):
        values = [unit * record[f"{split}_{key}"] for record in records]
        label = f"{split}, last {form.format(values[-1])}"
        axis.plot(epochs, values, color=color, marker=marker, label=label)
        axis.plot(epochs[-1], values[-1], "o", color=color)
    axis.set_xlim(0, 1.05 * epochs[-1])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    corner = "upper right" if key == "loss" else "lower right"
    axis.legend(loc=corner if len(epochs) > 2 else "best")


def draw_groups(groups: list[Group], path: pathlib.Path) -> None:
    """Plots loss and accuracy of all groups over epochs.

    Plots the mean of several runs, with a band of one standard deviation.

    Raises:
      UserError: path cannot be written, or has an unsupported extension.
    """
    figure, (loss, accuracy) = plt.subplots(
        1, 2, figsize=(11, 4.5), layout="constrained"
    )
    for i, group in enumerate(groups):
        color = f"C{i % 10}"
        _curve(loss, group, "train_loss", 1, color, ":")
        _curve(loss, group, "test_loss", 1, color, "-", group.label)
        _curve(accuracy, group, "test_accuracy", 100, color, "-", group.label)
    for axis in (loss, accuracy):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    loss.set(xlabel="epoch", ylabel="loss (nats); dotted: in training")
    # Matplotlib refuses a logarithmic axis if all losses are NaN.
    if any((line.get_ydata() > 0).any() for line in loss.lines):
        loss.set_yscale("log")
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    figure.legend(
        *accuracy.get_legend_handles_labels(), loc="outside lower center"
    )
    kind = path.suffix[1:]
    try:
        if kind not in figure.canvas.get_supported_filetypes():
            known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
            raise UserError(
                f"Cannot plot --out={path}: {kind!r} is not one of {known}."
            )
        # Resolves symbolic links, since the user chose the path.
        with (
            as_user_error(f"--out={path}"),
            atomic_write(path.resolve()) as file,
        ):
            figure.savefig(file, format=kind, dpi=150)
    finally:
        plt.close(figure)


def _curve(
    axes: plt.Axes,
    group: Group,
    key: str,
    unit: float,
    color: str,
    style: str,
    label: str | None = None,
) -> None:
    epochs = [record["epoch"] for record in group.runs[0].records]
    values = unit * np.array(
        [[record[key] for record in run.records] for run in group.runs]
    )
    mean = values.mean(0)
    dots = "." if len(epochs) < 30 else ""
    axes.plot(epochs, mean, style, color=color, label=label, marker=dots)
    if len(values) > 1:
        deviation = values.std(0, ddof=1)
        low, high = mean - deviation, mean + deviation
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
