"""Trains with several seeds; mean and standard deviation."""

from __future__ import annotations

import copy
import pathlib
import statistics
from typing import Any

from ml_collections import ConfigDict

from train import UserError, lock, loop, processes
from train.files import as_user_error, exists, refuse_links, write_json
from train.workdir import open_workdir, read_summary


def train(
    config: ConfigDict, workdir: pathlib.Path, **options: Any
) -> dict[str, Any]:
    """Trains with config.seeds seeds, each in its own subdirectory.

    Finished seeds are not trained again, so seeds can be added to a workdir.

    Args:
      config: config of the runs.
      workdir: directory of the runs.
      **options: further arguments of `Report`.

    Returns:
      The contents of summary.json: accuracies of all seeds, their mean, and
      their standard deviation with ddof=1.

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
                f"--workdir for seeds={config.seeds}."
            )
    seeds = range(config.seed, config.seed + config.seeds)
    summaries = []
    for i, seed in enumerate(seeds, 1):
        one = copy.deepcopy(config)
        one.seed, one.seeds = seed, 1
        named = {**options, "label": f"seed {i}/{len(seeds)}"}
        summaries.append(_train_one(one, workdir / f"seed-{seed}", named))
    accuracies = [each["test_accuracy"] for each in summaries]
    summary = {
        "seeds": list(seeds),
        "test_accuracies": accuracies,
        "test_accuracy": statistics.fmean(accuracies),
        "test_accuracy_deviation": statistics.stdev(accuracies),
        "epochs": summaries[0]["epochs"],
        "steps": summaries[0]["steps"],
        "seconds": round(sum(each["seconds"] for each in summaries), 1),
    }
    with processes.sync_errors():
        if processes.is_main():
            with as_user_error(workdir):
                write_json(workdir / "summary.json", summary)
    return summary


def _train_one(
    config: ConfigDict, workdir: pathlib.Path, options: dict[str, Any]
) -> dict[str, Any]:
    def done() -> dict[str, Any] | None:
        open_workdir(workdir, config)
        return read_summary(workdir)

    with processes.sync_errors():
        if processes.is_main():
            refuse_links(workdir)
    with lock.locked(workdir):
        summary = processes.broadcast_from_main(done)
    return summary or loop.train(config, workdir, **options)
