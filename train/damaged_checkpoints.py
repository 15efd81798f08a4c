"""CorruptCheckpoint checkpoints, put aside beside the folder of the others."""

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
    """Moves damaged checkpoints out of the way of new ones, with a warning.

    Args:
      folder: of the checkpoints.
      damaged: what is wrong with each, by step.
      step: of the checkpoint that is taken in their place.
      read_only: warns, and leaves them where they are.

    Raises:
      UserError: one cannot be moved.
    """
    if not damaged:
        return
    with processes.together():
        for each, why in damaged.items() if jax.process_index() == 0 else ():
            now = ""
            if not read_only:
                now = f" and is now {_move(folder, each)}"
            warnings.warn(
                f"The checkpoint of step {each} is damaged ({why}){now}; going "
                f"on from that of step {step}.",
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
    """Makes sure that a run without a checkpoint has never had one.

    Raises:
      UserError: results, or checkpoints that were put aside, are left of some.
    """
    workdir = folder.parent
    left = sorted(path.name for path in workdir.glob(f"{_NAME}*"))[:1]
    records = len(read_records(workdir))
    # A crash can leave the record of one epoch without its checkpoint, since
    # the next record waits for that, but it leaves the folder too.
    if records > 1 or (records and not exists(folder)):
        left.append("metrics.jsonl")
    if read_summary(workdir):
        left.append("summary.json")
    if left:
        names = " and ".join(left)
        raise UserError(
            f"{folder} holds no checkpoint, but {names} is left of a run that "
            "would begin again at step 0. Put a checkpoint back, take another "
            f"--workdir, or delete {names} to begin again."
        )
