# ruff: noqa: E402
"""Compares finished and unfinished runs: python -m train.compare RUN RUN ...

Prints a table of the config fields that differ and the results, and plots the
learning curves. Runs that differ only in seed are averaged, mean ± standard
deviation; the directory of a multi-seed run stands for all its seeds. Reads
only config.json, metrics.jsonl and summary.json.
"""

from __future__ import annotations

from train import clock, signals

if __name__ == "__main__":
    # Before the imports, which take seconds.
    signals.exit_on_ctrl_c("train.compare")
    clock.start("importing")

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from train import UserError, cli, output
from train.learning_curves import draw_groups
from train.run_groups import Group, Run, group_runs, read_run
from train.workdir import median_speed


def table(groups: list[Group], differ: list[str]) -> str:
    """Formats the groups as a text table.

    One wider than the output is cut between columns, below each other.
    """
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
        row.append("/".join(map(str, runs[0].progress)))
        row.append(_spread(runs, "test_accuracy", "{:.2f}", 100))
        row.append(_spread(runs, "test_loss", "{:.4f}"))
        if averaged:
            row.append(_spread(runs, "average_test_accuracy", "{:.2f}", 100))
        row.append(_spread(runs, "images_per_second", "{:,.0f}"))
        row.append(_spread(runs, "seconds", "{:,.0f}"))
        row.append(" ".join(sorted({_devices(run) for run in runs})))
        rows.append(row)
    first, *columns = zip(*rows)
    parts = [[first]]
    for column in columns:
        if parts[-1][1:] and _width([*parts[-1], column]) > output.WIDTH:
            parts.append([first])
        parts[-1].append(column)
    return "\n\n".join(map(_aligned, parts))


def _width(columns: list[tuple[str, ...]]) -> int:
    return sum(max(map(len, each)) + 2 for each in columns) - 2


def _aligned(columns: list[tuple[str, ...]]) -> str:
    """Formats columns side by side, with two spaces between them."""
    widths = [max(map(len, each)) for each in columns]
    rows = zip(*columns)
    return "\n".join(
        "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
    )


def _last(run: Run) -> dict[str, Any]:
    """Returns the results of a run after its last epoch."""
    return {**run.summary, **run.records[-1], **median_speed(run.records)}


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
    mean = form.format(np.mean(values))
    if len(values) == 1:
        return mean
    # statistics.stdev raises for NaN.
    return f"{mean} ± {form.format(np.std(values, ddof=1))}"


def with_extension(out: pathlib.Path) -> pathlib.Path:
    """Appends .png to a path without an extension."""
    return out if out.suffix else out.with_name(out.name + ".png")


def compare(
    paths: Iterable[pathlib.Path], out: pathlib.Path
) -> tuple[list[Group], list[str]]:
    """Prints a table of the runs and plots their learning curves.

    Args:
      paths: workdirs of runs, or of multi-seed runs.
      out: output path; its extension selects the format.

    Returns:
      The groups, and the names of the config fields that differ.

    Raises:
      UserError: a path is not a run, has no records or is given twice; or out
        cannot be written.
    """
    paths = [one for path in paths for one in _seeds(path)]
    seen: set[pathlib.Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice.")
        seen.add(path.resolve())
    groups, differ = group_runs([read_run(path) for path in paths])
    print(table(groups, differ))
    draw_groups(groups, out)
    return groups, differ


def _seeds(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the runs of a multi-seed run, or else the path itself."""
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
        help="output file; default compare.png",
    )
    given = parser.parse_args(arguments)
    if given.out.is_dir():
        parser.error(f"--out={given.out} is a directory; it must be a file")
    out = with_extension(given.out)
    compare(given.runs, out)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    cli.run("train.compare", main)
