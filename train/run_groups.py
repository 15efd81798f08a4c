"""Reads runs from their workdirs and groups them by config."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from train import UserError
from train.duration import num_epochs, tested_epochs
from train.trained_run import read_config
from train.workdir import (
    missing_epochs,
    read_records,
    read_summary,
)

# Fields that do not affect the result.
IGNORED_FIELDS = (
    "seed",
    "num_seeds",
    "data_dir",
    "checkpoint_every",
    "profile",
)


class Run(NamedTuple):
    """The contents of a workdir."""

    path: pathlib.Path
    config: dict[str, Any]  # flattened, with dotted names
    records: list[dict[str, float]]  # one per epoch
    summary: dict[str, Any]  # empty until the run finishes

    @property
    def progress(self) -> tuple[int, int]:
        """Epochs of the last record, and of the whole run."""
        done = int(self.records[-1]["epoch"]) if self.records else 0
        return done, num_epochs(self.config["epochs"])


class Group(NamedTuple):
    """Runs that differ only in seed, with equally many epochs."""

    runs: list[Run]
    label: str  # the differing config fields, or the directory name


def read_run(path: pathlib.Path) -> Run:
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
    expected = tested_epochs(config)
    if not summary:
        expected = [epoch for epoch in expected if epoch <= last]
    missing = missing_epochs(records, expected)
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


def group_runs(runs: list[Run]) -> tuple[list[Group], list[str]]:
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
        key = json.dumps([values, run.progress])
        groups.setdefault(key, []).append(run)
    found = [
        Group(members, _label(members, differ)) for members in groups.values()
    ]
    return found, differ


def _label(runs: list[Run], differ: list[str]) -> str:
    run, (done, epochs) = runs[0], runs[0].progress
    values = [f"{name}={run.config.get(name)}" for name in differ]
    label = ", ".join(values) or run.path.name
    if done < epochs:
        label += f" ({done} of {epochs} epochs)"
    return label if len(runs) == 1 else f"{label}, {len(runs)} runs"
