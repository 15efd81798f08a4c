# ruff: noqa: E402
"""Compares finished and unfinished runs: python -m train.compare RUN RUN ...

Prints a table of the config fields that differ and the results, and plots the
learning curves. Runs that differ only in seed are averaged, mean ± standard
deviation; the directory of a multi-seed run stands for all its seeds. Reads
only config.json, metrics.jsonl and summary.json.
"""

from __future__ import annotations

from train import signals

if __name__ == "__main__":
    signals.exit_on_ctrl_c(
        "train.compare"
    )  # before the imports, which take seconds

import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from train import UserError, cli
from train.files import as_user_error, atomic_write
from train.trained_run import read_config
from train.workdir import missing_epochs, read_records, read_summary

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Fields that do not affect the result.
IGNORED_FIELDS = ("seed", "seeds", "data_dir", "checkpoint_every", "profile")


class Run(NamedTuple):
    """The contents of a workdir."""

    path: pathlib.Path
    config: dict[str, Any]  # flattened, with dotted names
    records: list[dict[str, float]]  # one per epoch
    summary: dict[str, Any]  # empty until the run finishes


class Group(NamedTuple):
    """Runs that differ only in seed, with equally many epochs."""

    runs: list[Run]
    label: str  # the differing config fields, or the directory name


def read(path: pathlib.Path) -> Run:
    """Reads one run.

    Raises:
      UserError: path is not a workdir, has no records, or a file is damaged.
    """
    config = _flat(json.loads(read_config(path).to_json()))
    records, summary = read_records(path), read_summary(path)
    if not records and not summary:
        raise UserError(
            f"{path} has no records yet; they are written after each epoch."
        )
    last = max([int(one["epoch"]) for one in records], default=0)
    missing = missing_epochs(records, config["epochs"] if summary else last)
    if missing:
        raise UserError(
            f"{path / 'metrics.jsonl'} lacks {missing}. Restore it from a "
            "backup, or leave this run out."
        )
    return Run(path, config, records, summary)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def grouped(runs: list[Run]) -> tuple[list[Group], list[str]]:
    """Groups runs by config, in order of first appearance.

    Unfinished runs are grouped with those of equally many epochs.

    Returns:
      The groups, and the names of the config fields that differ.
    """
    every = {name for run in runs for name in run.config}
    differ = [
        name
        for name in sorted(every - {*IGNORED_FIELDS})
        if len({json.dumps(run.config.get(name)) for run in runs}) > 1
    ]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        values = [run.config.get(name) for name in differ]
        key = json.dumps([values, len(run.records)])
        groups.setdefault(key, []).append(run)
    found = [
        Group(members, _label(members, differ)) for members in groups.values()
    ]
    return found, differ


def _label(runs: list[Run], differ: list[str]) -> str:
    run, done = runs[0], len(runs[0].records)
    values = [f"{name}={run.config.get(name)}" for name in differ]
    label = ", ".join(values) or run.path.name
    if done < run.config["epochs"]:
        label += f" ({done} of {run.config['epochs']} epochs)"
    return label if len(runs) == 1 else f"{label}, {len(runs)} runs"


def table(groups: list[Group], differ: list[str]) -> str:
    """Formats the groups as a text table."""
    averaged = any("average_test_accuracy" in _last(g.runs[0]) for g in groups)
    head = ["run", *differ, "seeds", "epochs", "accuracy %", "loss"]
    head += ["average's %"] if averaged else []
    head += ["images/s", "seconds", "devices"]
    rows = [head]
    for group in groups:
        runs = group.runs
        name = runs[0].path.name + (f" + {len(runs) - 1}" if runs[1:] else "")
        row = [name, *(str(runs[0].config.get(key)) for key in differ)]
        row.append(",".join(str(run.config["seed"]) for run in runs))
        row.append(f"{len(runs[0].records)}/{runs[0].config['epochs']}")
        row.append(_spread(runs, "test_accuracy", "{:.2f}", 100))
        row.append(_spread(runs, "test_loss", "{:.4f}"))
        if averaged:
            row.append(_spread(runs, "average_test_accuracy", "{:.2f}", 100))
        row.append(_spread(runs, "images_per_second", "{:,.0f}"))
        row.append(_spread(runs, "seconds", "{:,.0f}"))
        row.append(" ".join(sorted({_devices(run) for run in runs})))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
    )


def _last(run: Run) -> dict[str, Any]:
    """Returns the results of a run after its last epoch."""
    # The first epoch includes compilation.
    speeds = [record["images_per_second"] for record in run.records]
    speed = statistics.median(speeds[1:] or speeds)
    return {**run.summary, **run.records[-1], "images_per_second": speed}


def _devices(run: Run) -> str:
    if not {"devices", "device_kind"} <= {*run.summary}:
        return "?"
    return f"{run.summary['devices']} {run.summary['device_kind']}"


def _spread(runs: list[Run], key: str, form: str, unit: float = 1.0) -> str:
    """Formats the mean, with the standard deviation of several runs."""
    last = [_last(run) for run in runs]
    if any(key not in one for one in last):
        return "-"
    values = [unit * one[key] for one in last]
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


def draw(groups: list[Group], path: pathlib.Path) -> None:
    """Draws loss and accuracy of all groups over the epochs.

    Of several runs the mean, in a band of one standard deviation.

    Raises:
      UserError: path cannot be written, or has an ending of no known format.
    """
    figure, (loss, accuracy) = plt.subplots(
        1, 2, figsize=(11, 4.5), layout="constrained"
    )
    for i, group in enumerate(groups):
        color = f"C{i % 10}"
        _curve(loss, group, "train_loss", 1, color, ":")
        _curve(loss, group, "test_loss", 1, color, "-", group.label)
        _curve(accuracy, group, "test_accuracy", 100, color, "-", group.label)
    loss.set(xlabel="epoch", ylabel="loss (nats); dotted: in training")
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
                f"Cannot draw --out={path}: {kind!r} is none of {known}."
            )
        # Through a link: whose it is, who calls has said.
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


def with_ending(out: pathlib.Path) -> pathlib.Path:
    """Returns the name of the picture: a PNG if it says nothing else."""
    return out if out.suffix else out.with_name(out.name + ".png")


def compare(
    paths: Iterable[pathlib.Path], out: pathlib.Path
) -> tuple[list[Group], list[str]]:
    """Prints the table of the runs and draws their curves into out.

    Args:
      paths: of runs, or of folders of seeds.
      out: of the picture; its ending says the format, which it must have.

    Returns:
      The groups, and the fields of the configs that differ.

    Raises:
      UserError: a folder is no run or has no records, or is given twice; or out
        cannot be written.
    """
    paths = [one for path in paths for one in _seeds(path)]
    seen: set[pathlib.Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice.")
        seen.add(path.resolve())
    groups, differ = grouped([read(path) for path in paths])
    print(table(groups, differ))
    draw(groups, out)
    return groups, differ


def _seeds(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the runs in a folder of seeds, or else the path itself."""
    runs = [config.parent for config in path.glob("seed-*/config.json")]
    if (path / "config.json").exists() or not runs:
        return [path]
    return sorted(runs, key=lambda run: (len(run.name), run.name))


def main(arguments: list[str]) -> None:
    parser = cli.Parser(
        "python -m train.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=cli.folder,
        metavar="RUN",
        help="the --workdir of a run",
    )
    parser.add_argument(
        "--out",
        type=cli.folder,
        default=pathlib.Path("compare.png"),
        metavar="FILE",
        help="of the picture; compare.png without, and .png if it has no "
        "ending",
    )
    given = parser.parse_args(arguments)
    if given.out.is_dir():
        parser.error(f"--out={given.out} is a folder; give a file")
    out = with_ending(given.out)
    compare(given.runs, out)
    print(f"The picture is {out}.")


if __name__ == "__main__":
    cli.run("train.compare", main)
