"""Trains with several seeds; mean and standard deviation."""

from __future__ import annotations

import copy
import pathlib
import statistics
from typing import Any

from ml_collections import ConfigDict

from train import UserError, lock, loop, processes
from train.files import as_user_error, exists, refuse_links, write_json
from train.session import Session, make_session
from train.workdir import open_workdir, read_summary

# Results of which the mean and the deviation are reported.
RESULTS = (
    *("test_accuracy", "test_accuracy_augmented"),
    *("training_seconds", "images_per_second"),
)


def train(
    config: ConfigDict, workdir: pathlib.Path, **options: Any
) -> dict[str, Any]:
    """Trains with config.num_seeds seeds, each in its own subdirectory.

    Finished seeds are not trained again, so seeds can be added to a workdir.
    Programs are compiled once.

    Args:
      config: config of the runs.
      workdir: directory of the runs.
      **options: further arguments of `Report`.

    Returns:
      The contents of summary.json: for each of RESULTS that all seeds have, its
      mean, under "_deviation" its standard deviation with ddof=1, and under
      "_of_seeds" the values.

    Raises:
      UserError: the config is invalid, or a directory holds another run.
      Stopped: a signal was received; the state is saved.
    """
    with lock.locked(workdir):
        return _train(config, workdir, options)


def _train(
    config: ConfigDict, workdir: pathlib.Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Trains in a workdir that is locked."""
    with processes.sync_errors():
        if processes.is_main() and exists(workdir / "config.json"):
            raise UserError(
                f"{workdir} holds a run with a single seed; use another "
                f"--workdir for num_seeds={config.num_seeds}."
            )
    seeds = range(config.seed, config.seed + config.num_seeds)
    summaries = []
    session: Session | None = None
    for i, seed in enumerate(seeds, 1):
        one = copy.deepcopy(config)
        one.seed, one.num_seeds = seed, 1
        folder = workdir / f"seed-{seed}"
        found = _finished(one, folder)
        if not found:
            session = session or make_session(config)
            label = f"seed {i}/{len(seeds)}"
            found = loop.train(one, folder, session, label=label, **options)
        summaries.append(found)
    summary = {"seeds": list(seeds), **_spread(summaries)}
    for name in ("epochs", "steps", "devices", "device_kind", "versions"):
        if name in summaries[0]:
            summary[name] = summaries[0][name]
    if all("seconds" in each for each in summaries):
        seconds = sum(each["seconds"] for each in summaries)
        summary["seconds"] = round(seconds, 1)
    with processes.sync_errors():
        if processes.is_main():
            with as_user_error(workdir):
                write_json(workdir / "summary.json", summary)
    return summary


def _spread(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    spread: dict[str, Any] = {}
    for name in RESULTS:
        if any(name not in each for each in summaries):
            continue
        values = [each[name] for each in summaries]
        spread[name] = statistics.fmean(values)
        spread[f"{name}_deviation"] = statistics.stdev(values)
        spread[f"{name}_of_seeds"] = values
    return spread


def _finished(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Opens the directory of a seed; returns its summary, or {}."""

    def summary() -> dict[str, Any]:
        open_workdir(workdir, config)
        return read_summary(workdir)

    with processes.sync_errors():
        if processes.is_main():
            refuse_links(workdir)
    with lock.locked(workdir):
        return processes.broadcast_from_main(summary)
