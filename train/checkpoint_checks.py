"""Checks that a checkpoint is intact and matches the code."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from train import UserError, processes
from train.checksums import CorruptCheckpoint, verify
from train.state import TrainState

MAX_LISTED = 3  # differences


def find_damage(folder: pathlib.Path, like: TrainState) -> str:
    """Returns how a checkpoint is damaged, or "", the same on all processes.

    Args:
      folder: the checkpoint, named by its step.
      like: the state to restore.

    Raises:
      UserError: it cannot be read, or does not match the code.
    """
    step, where, wrong = folder.name, folder.parent, ""
    with processes.sync_errors():
        try:
            verify(folder)
            found = read_metadata(folder)["arrays"]
        except CorruptCheckpoint as error:
            wrong = str(error)
        except OSError as error:
            raise UserError(
                f"The checkpoint of step {step} in {where} cannot be read: "
                f"{error.strerror or error}. Nothing was moved; once it can "
                "be read, rerun the same command to resume."
            ) from error
        else:
            differ = _differences(array_specs(like._asdict()), found)
            if differ:
                raise UserError(
                    f"The checkpoint of step {step} in {where} does not match "
                    f"this code: {differ}. Nothing was moved; use the code "
                    "that wrote it, or another --workdir."
                )
    return next(filter(None, processes.all_gather(wrong)), "")


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the metadata saved with the state."""
    return json.loads((folder / "progress" / "metadata").read_text())


def read_test_accuracy(folder: pathlib.Path) -> float | None:
    """Returns the test accuracy; None if missing or damaged."""
    try:
        verify(folder, "progress/")
        return read_metadata(folder)["test_accuracy"]
    except (CorruptCheckpoint, OSError, ValueError, KeyError):
        return None


def array_specs(tree: Any) -> dict[str, list[Any]]:
    """Returns names, shapes and dtypes of a state, JSON-serializable."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def _differences(
    wanted: dict[str, list[Any]], found: dict[str, list[Any]]
) -> str:
    """Describes how the arrays of a checkpoint differ from the code's."""
    differences = [f"it has no {name}" for name in wanted if name not in found]
    differences += [f"it has {name}" for name in found if name not in wanted]
    differences += [
        f"{name} is {found[name][1]}{found[name][0]} and not "
        f"{wanted[name][1]}{wanted[name][0]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    more = (
        f", and {len(differences) - MAX_LISTED} more"
        if len(differences) > MAX_LISTED
        else ""
    )
    return ", ".join(differences[:MAX_LISTED]) + more
