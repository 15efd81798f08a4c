"""Logs epochs to Weights & Biases, which is imported only if asked for."""

from __future__ import annotations

import importlib
import pathlib
import secrets
import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from train import UserError
from train.files import as_user_error, exists, read_json, write_json


def require() -> ModuleType:
    """Imports wandb.

    Raises:
      UserError: it is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb needs the package wandb ({error}): pip install wandb"
        ) from error
    # A folder wandb/, as left by other runs, imports as an empty package.
    if not hasattr(wandb, "init"):
        raise UserError("--wandb needs the package wandb: pip install wandb")
    return wandb


class WandbRun:
    """A run of Weights & Biases that a resumed run continues.

    wandb.json in the workdir holds its id and the last step that was logged, so
    that no epoch is logged twice, offline either.

    Args:
      project: name of the project.
      workdir: directory of the run.
      records: records of the epochs so far; those not yet logged are logged.
      group: groups the runs of several seeds; empty for a single one.

    Raises:
      UserError: wandb is not installed or refuses the run, or wandb.json is
        damaged or cannot be written.
    """

    def __init__(
        self,
        project: str,
        workdir: pathlib.Path,
        *,
        records: Iterable[Mapping[str, float]] = (),
        group: str = "",
    ):
        wandb = require()
        self._path = workdir / "wandb.json"
        self._state = _state(self._path, project)
        folder = workdir / "wandb"
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a symbolic link, and links in a workdir are not "
                "followed. Remove it, or use another --workdir."
            )
        with as_user_error(workdir):
            write_json(self._path, self._state)
        config = workdir / "config.json"
        name = workdir.absolute().name
        try:
            self._run = wandb.init(
                project=project,
                id=self._state["id"],
                resume="allow",
                name=f"{group}-{name}" if group else name,
                group=group or None,
                dir=str(workdir.absolute()),
                config=read_json(config) if exists(config) else {},
                allow_val_change=True,  # fields that may change, as cpu_devices
            )
        except UserError:
            raise
        except Exception as error:  # no login, no network, a bad name
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"--wandb={project}: {reason}. WANDB_MODE=offline logs to "
                f"{folder} alone."
            ) from error
        with as_user_error(workdir):
            for record in records:
                self.log(record)

    def log(self, record: Mapping[str, float]) -> None:
        """Logs the record of an epoch, unless it is logged already."""
        step = int(record["step"])
        if step <= self._state["step"]:
            return
        values = {key: value for key, value in record.items() if key != "step"}
        self._run.log(values, step=step)
        self._state["step"] = step
        write_json(self._path, self._state)

    def finish(self, *, failed: bool) -> None:
        """Waits for uploads and ends the run; what goes wrong is a warning."""
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:  # the results are in the workdir
            reason = " ".join(str(error).split())
            warnings.warn(f"--wandb: {reason}", stacklevel=2)


def _state(path: pathlib.Path, project: str) -> dict[str, Any]:
    """Returns project, id and last step logged; new ones for a new project."""
    new = {"project": project, "id": secrets.token_hex(4), "step": 0}
    if not exists(path):
        return new
    found = read_json(path)
    for key, value in new.items():
        if type(found.get(key)) is not type(value):
            raise UserError(
                f"{path} is damaged: {key} is {found.get(key)!r}. Remove it to "
                "log to a new run of Weights & Biases."
            )
    return found if found["project"] == project else new
