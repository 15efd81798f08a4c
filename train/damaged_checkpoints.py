"""Moves damaged checkpoints out of the checkpoint directory."""

from __future__ import annotations

import itertools
import os
import pathlib
import warnings

import jax

from train import UserError, processes
from train.files import exists
from train.workdir import read_records, read_summary

_NAME = "damaged-checkpoint-"


def move_damaged(
    folder: pathlib.Path, damaged: dict[int, str], step: int, read_only: bool
) -> None:
    """Moves damaged checkpoints to the workdir, with a warning.

    Args:
      folder: the checkpoint directory.
      damaged: maps the step of a damaged checkpoint to what is wrong with it.
      step: step of the checkpoint that is used instead.
      read_only: only warns.

    Raises:
      UserError: a checkpoint cannot be moved.
    """
    if not damaged:
        return
    with processes.sync_errors():
        for each, why in damaged.items() if jax.process_index() == 0 else ():
            now = ""
            if not read_only:
                now = f" and was moved to {_move(folder, each)}"
            warnings.warn(
                f"The checkpoint of step {each} is damaged ({why}){now}; "
                f"resuming from step {step}.",
                stacklevel=2,
            )


def _move(folder: pathlib.Path, step: int) -> pathlib.Path:
    for number in itertools.count(1):
        more = f"-{number}" if number > 1 else ""
        aside = folder.parent / f"{_NAME}{step}{more}"
        if not os.path.lexists(aside):
            break
    try:
        os.rename(folder / str(step), aside)
    except OSError as error:
        raise UserError(
            f"The checkpoint of step {step} is damaged and cannot be moved to "
            f"{aside}: {error.strerror}."
        ) from error
    return aside


def refuse_fresh_start(folder: pathlib.Path) -> None:
    """Checks that a run without checkpoints has never had any.

    Raises:
      UserError: there are results or damaged checkpoints of an earlier run.
    """
    workdir = folder.parent
    left = sorted(path.name for path in workdir.glob(f"{_NAME}*"))[:1]
    records = len(read_records(workdir))
    # A crash can leave the record of one epoch without a checkpoint, because
    # only the next record waits for it, but then the directory exists.
    if records > 1 or (records and not exists(folder)):
        left.append("metrics.jsonl")
    if read_summary(workdir):
        left.append("summary.json")
    if left:
        names = " and ".join(left)
        raise UserError(
            f"{folder} has no checkpoint, but an earlier run left {names}, and "
            "would restart from step 0. Restore a checkpoint, use another "
            f"--workdir, or delete {names} to restart."
        )
