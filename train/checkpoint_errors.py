"""Errors in writing checkpoints and results, as UserErrors."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator

import orbax.checkpoint as ocp

from train import UserError

# Operating system errors as they appear in orbax's messages.
_OS_ERROR = re.compile(
    r"no space left|file too large|disk quota|read-only file|permission denied"
    r"|input/output error",
    re.IGNORECASE,
)


@contextlib.contextmanager
def as_user_errors(
    folder: pathlib.Path, manager: ocp.CheckpointManager | None
) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _OS_ERROR.search(str(error))
        if not reason and not isinstance(error, OSError):
            raise
        whole = None if manager is None else newest_step(manager)
        raise UserError(
            f"Cannot write a checkpoint to {folder}: "
            f"{reason[0].lower() if reason else error}. {resume_hint(whole)}"
        ) from error


@contextlib.contextmanager
def with_resume_hint(
    what: pathlib.Path, newest: Callable[[], int | None]
) -> Iterator[None]:
    """Turns an OSError of writing results into a UserError.

    Args:
      what: the file or directory.
      newest: returns the step of the newest checkpoint.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write to {what}: {error.strerror or error}. "
            f"{resume_hint(newest())}"
        ) from error


def newest_step(manager: ocp.CheckpointManager) -> int | None:
    """Step of the newest checkpoint on disk; orbax also counts pending ones."""
    with contextlib.suppress(Exception):
        manager.wait_until_finished()
    return max(manager.all_steps(read=True), default=None)


def resume_hint(step: int | None) -> str:
    """Says from which step a run that failed to write can be resumed."""
    if step is None:
        return "There is no checkpoint."
    return (
        f"Rerun the same command to resume from the checkpoint of step {step}."
    )
