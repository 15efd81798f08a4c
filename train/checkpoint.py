"""Checkpoints of a run, by orbax."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from train import UserError, processes
from train.checkpoint_checks import (
    array_specs,
    find_damage,
    read_metadata,
    read_test_accuracy,
)
from train.checksums import ChecksummedPath
from train.damaged_checkpoints import move_damaged, refuse_fresh_start
from train.files import exists, refuse_links
from train.step import Sums, TrainState
from train.workdir import check_name

# JAX wants a number that rises in the life of a process, over all its runs.
_preemption_queries = itertools.count(1)

NUM_RECENT = 2  # a crash while the newest is written leaves the one before


class Progress(NamedTuple):
    """Where in the run a state is; kept beside it in a checkpoint."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the next one
    sums: tuple[float, ...] = (0.0,) * len(Sums._fields)  # over these


class Checkpoints:
    """Saves and restores TrainState under a folder; use as a context.

    Keeps the newest two, and the one with the best test accuracy. Writes in the
    background, from all processes; a checkpoint is there whole or not at all,
    and with checksums of its files.

    Args:
      folder: that they lie in.
      read_only: leaves the folder as it is, for a run that may go on meanwhile.

    Raises:
      UserError: orbax cannot work in the folder, it is a link or holds one, or
        it is gone while results of the run are left.
    """

    def __init__(self, folder: pathlib.Path, *, read_only: bool = False):
        check_name(folder)
        self._folder = folder.absolute()
        self._read_only = read_only
        self._accuracy: dict[int, float] = {}
        with processes.together():
            if not read_only and jax.process_index() == 0:
                refuse_links(self._folder)
                if not exists(self._folder):
                    refuse_fresh_start(self._folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None
            if read_only
            else _RetentionPolicy(self._accuracy),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            temporary_path_class=ChecksummedPath,
            lightweight_initialize=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise UserError(
                f"Cannot use {self._folder}: {error.strerror or error}."
            ) from error
        for step in self._manager.all_steps():
            accuracy = read_test_accuracy(self._folder / str(step))
            if accuracy is not None:
                self._accuracy[step] = accuracy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # What went wrong is known already.
            with contextlib.suppress(Exception):
                self._manager.close()
            return
        with _as_user_errors(self._folder, self._manager):
            self._manager.close()  # waits for what is still being written

    @property
    def newest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return _newest(self._manager)

    def save(
        self,
        state: TrainState,
        progress: Progress,
        *,
        test_accuracy: float | None = None,
    ) -> None:
        """Begins to write the state; progress is where to go on.

        Raises:
          UserError: this one, or the one before, cannot be written.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        if test_accuracy is not None:
            self._accuracy[step] = test_accuracy
        tree = state._asdict()
        saved = {
            **progress._asdict(),
            "test_accuracy": test_accuracy,
            "arrays": array_specs(tree),
        }
        with _as_user_errors(self._folder, self._manager):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    progress=ocp.args.JsonSave(saved),
                ),
            )

    def wait(self) -> None:
        """Returns once everything is written."""
        with _as_user_errors(self._folder, self._manager):
            self._manager.wait_until_finished()

    def preempted(self) -> bool:
        """Whether the machines are to be given back; all processes agree.

        Each has to ask equally often: they agree on one of the questions.
        """
        return jax.process_count() > 1 and self._manager.reached_preemption(
            next(_preemption_queries)
        )

    def restore(
        self, like: TrainState, *, best: bool = False
    ) -> tuple[TrainState, Progress] | None:
        """Returns (state, progress) of the newest that is whole, or None.

        Damage is that a file is not as it was written. Such a checkpoint is put
        aside once an older one has been read, or if read_only passed over, with
        a warning. What is whole and cannot be restored stays, and is an error.

        Args:
          like: of `abstract_state`. What is read gets its shapes, dtypes and
            devices, however many devices had written it.
          best: takes the one with the best test accuracy; None also where
            none has a test.

        Raises:
          UserError: there are checkpoints, and all are damaged; the newest that
            is not cannot be read, or holds other arrays than the code asks for;
            or there are none, but what else is in the workdir says that there
            were.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best:
            tested = sorted(
                self._accuracy, key=lambda s: (self._accuracy[s], s)
            )
            steps = tested[-1:]
        damaged: dict[int, str] = {}
        for step in steps:
            wrong = find_damage(self._folder / str(step), like)
            if not wrong:
                found = self._read(step, like)
                move_damaged(self._folder, damaged, step, self._read_only)
                self._manager.reload()
                return found
            damaged[step] = wrong
        if damaged:
            listed = "; ".join(f"step {n}: {why}" for n, why in damaged.items())
            raise UserError(
                f"No checkpoint in {self._folder} is whole ({listed}). They "
                "stay where they are: mend them, or take another --workdir."
            )
        with processes.together():
            if not self._read_only and jax.process_index() == 0:
                refuse_fresh_start(self._folder)
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        about = read_metadata(self._folder / str(step))
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like._asdict()),
                ),
            )
        except Exception as error:
            if processes.is_lost(error):
                raise
            # Orbax reports in many lines; the first words say what it is.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"The checkpoint of step {step} in {self._folder} is as it was "
                f"written, but cannot be restored here: {reason}. Nothing was "
                "moved."
            ) from error
        progress = Progress(
            about["epoch"], about["batch"], tuple(about["sums"])
        )
        return TrainState(**found.state), progress


class _RetentionPolicy:
    """Keeps the newest checkpoints, and the one with the best test accuracy.

    Args:
      accuracy: by step; of those that have been tested.
    """

    def __init__(self, accuracy: dict[int, float]):
        self._accuracy = accuracy

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]
        keep = {*sorted(steps)[-NUM_RECENT:]}
        tested = [step for step in sorted(steps) if step in self._accuracy]
        if tested:
            keep.add(max(reversed(tested), key=self._accuracy.__getitem__))
        return [step in keep for step in steps]


# What the system says when a file cannot be written, in orbax's words.
_OS_ERROR = re.compile(
    r"no space left|file too large|disk quota|read-only file|permission denied"
    r"|input/output error",
    re.IGNORECASE,
)


@contextlib.contextmanager
def _as_user_errors(
    folder: pathlib.Path, manager: ocp.CheckpointManager | None
) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _OS_ERROR.search(str(error))
        if not reason and not isinstance(error, OSError):
            raise
        whole = None if manager is None else _newest(manager)
        raise UserError(
            f"Cannot write a checkpoint to {folder}: "
            f"{reason[0].lower() if reason else error}. {resume_hint(whole)}"
        ) from error


def _newest(manager: ocp.CheckpointManager) -> int | None:
    """What lies in the folder; orbax counts what it is writing as well."""
    with contextlib.suppress(Exception):
        manager.wait_until_finished()
    return max(manager.all_steps(read=True), default=None)


def resume_hint(step: int | None) -> str:
    """Says from where a run goes on that could not write."""
    if step is None:
        return "There is no checkpoint."
    return (
        f"The checkpoint of step {step} is whole: the same command goes on "
        "from there."
    )
