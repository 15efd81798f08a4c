"""Whether a checkpoint is whole, and holds what the code asks for."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from train import UserError, processes
from train.checksums import CorruptCheckpoint, verify
from train.step import TrainState

MAX_LISTED = 3  # differences


def find_damage(folder: pathlib.Path, like: TrainState) -> str:
    """Returns how a checkpoint is damaged; all processes agree.

    Args:
      folder: of the checkpoint, named by its step.
      like: what is to be restored.

    Raises:
      UserError: it cannot be read, or is not for this code.
    """
    step, where, wrong = folder.name, folder.parent, ""
    with processes.together():
        try:
            verify(folder)
            found = read_metadata(folder)["arrays"]
        except CorruptCheckpoint as error:
            wrong = str(error)
        except OSError as error:
            raise UserError(
                f"The checkpoint of step {step} in {where} cannot be read: "
                f"{error.strerror or error}. Nothing was moved; the same "
                "command goes on once it can."
            ) from error
        else:
            differ = _differences(array_specs(like._asdict()), found)
            if differ:
                raise UserError(
                    f"The checkpoint of step {step} in {where} is not for this "
                    f"code: {differ}. Nothing was moved; go on with the code "
                    "that wrote it, or take another --workdir."
                )
    return next(filter(None, processes.exchange(wrong)), "")


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a checkpoint has beside the state."""
    return json.loads((folder / "progress" / "metadata").read_text())


def read_test_accuracy(folder: pathlib.Path) -> float | None:
    """Returns the test accuracy; None without one, or if it is damaged."""
    try:
        verify(folder, "progress/")
        return read_metadata(folder)["test_accuracy"]
    except (CorruptCheckpoint, OSError, ValueError, KeyError):
        return None


def array_specs(tree: Any) -> dict[str, list[Any]]:
    """Returns names, shapes and dtypes of a state, as JSON has them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
    }


def _differences(
    wanted: dict[str, list[Any]], found: dict[str, list[Any]]
) -> str:
    """Says how the arrays of a checkpoint are not those of the code."""
    said = [f"it has no {name}" for name in wanted if name not in found]
    said += [f"it has {name}" for name in found if name not in wanted]
    said += [
        f"{name} is {found[name][1]}{found[name][0]} and not "
        f"{wanted[name][1]}{wanted[name][0]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    more = (
        f", and {len(said) - MAX_LISTED} more" if len(said) > MAX_LISTED else ""
    )
    return ", ".join(said[:MAX_LISTED]) + more
