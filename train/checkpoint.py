"""Saves and restores checkpoints with orbax."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from typing import NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from train import UserError, processes
from train.checkpoint_checks import (
    array_specs,
    find_damage,
    read_metadata,
    read_test_accuracy,
)
from train.checkpoint_errors import as_user_errors, newest_step
from train.checksums import ChecksummedPath
from train.damaged_checkpoints import move_damaged, refuse_fresh_start
from train.files import exists, none_to_nan, nonfinite_to_none, refuse_links
from train.retention import RetentionPolicy
from train.state import NO_SUMS, TrainState
from train.workdir import check_name, read_records

# JAX expects a step that increases over the lifetime of the process.
_preemption_queries = itertools.count(1)


class Progress(NamedTuple):
    """Position in the run, saved with the state."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # completed batches of the current epoch
    sums: tuple[float, ...] = NO_SUMS  # over those batches


class Checkpoints:
    """Context manager that saves and restores TrainState in a directory.

    Keeps the two most recent checkpoints and the one with the best test
    accuracy. Saving is asynchronous and done by all processes. Checkpoints are
    atomic and carry checksums of their files.

    Args:
      folder: the checkpoint directory.
      read_only: does not modify the directory, so that the run may continue.

    Raises:
      UserError: orbax cannot use the directory; it is or contains a symbolic
        link; or it is missing while other results of the run exist.
    """

    def __init__(self, folder: pathlib.Path, *, read_only: bool = False):
        check_name(folder)
        self._folder = folder.absolute()
        self._read_only = read_only
        self._accuracy: dict[int, float] = {}
        with processes.sync_errors():
            if not read_only and jax.process_index() == 0:
                refuse_links(self._folder)
                if not exists(self._folder):
                    refuse_fresh_start(self._folder)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None
            if read_only
            else RetentionPolicy(self._accuracy),
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
        tested = _tested(self._folder.parent)
        for step in self._manager.all_steps():
            accuracy = read_test_accuracy(self._folder / str(step))
            if accuracy is None:
                accuracy = tested.get(step)
            if accuracy is not None:
                self._accuracy[step] = accuracy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # The first error is the one to report.
            with contextlib.suppress(Exception):
                self._manager.close()
            return
        with as_user_errors(self._folder, self._manager):
            self._manager.close()  # waits for pending writes

    @property
    def newest(self) -> int | None:
        """Step of the most recent complete checkpoint."""
        return newest_step(self._manager)

    def save(
        self,
        state: TrainState,
        progress: Progress,
        *,
        test_accuracy: float | None = None,
    ) -> None:
        """Starts saving the state and progress asynchronously.

        Raises:
          UserError: this one, or the one before, cannot be written.
        """
        step = int(state.step)
        if test_accuracy is not None:
            self._accuracy[step] = test_accuracy
        if step == self._manager.latest_step():
            return
        tree = state._asdict()
        saved = nonfinite_to_none(
            {
                **progress._asdict(),
                "test_accuracy": test_accuracy,
                "arrays": array_specs(tree),
            }
        )
        with as_user_errors(self._folder, self._manager):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    progress=ocp.args.JsonSave(saved),
                ),
            )

    def wait(self) -> None:
        """Blocks until all saves are complete."""
        with as_user_errors(self._folder, self._manager):
            self._manager.wait_until_finished()

    def preempted(self) -> bool:
        """Whether a preemption notice was received; the same in all processes.

        Every process must call this equally often: they agree on one call.
        """
        return jax.process_count() > 1 and self._manager.reached_preemption(
            next(_preemption_queries)
        )

    def restore(
        self, like: TrainState, *, best: bool = False
    ) -> tuple[TrainState, Progress] | None:
        """Returns (state, progress) of the most recent intact checkpoint.

        A checkpoint is damaged if a file has changed since it was written. Once
        an older one has been restored, damaged ones are moved away with a
        warning, or only skipped if read_only. An intact checkpoint that cannot
        be restored is an error.

        Args:
          like: result of `abstract_state`. The restored arrays have its shapes,
            dtypes and shardings, however many devices wrote them.
          best: restores the checkpoint with the best test accuracy instead.

        Returns:
          (state, progress), or None without a checkpoint, or with best without
          one that was tested.

        Raises:
          UserError: all checkpoints are damaged; the newest intact one cannot
            be read or does not match the code; or there are none, but other
            files in the workdir show that there were.
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
                f"All checkpoints in {self._folder} are damaged ({listed}). "
                "They were not moved: repair them, or use another --workdir."
            )
        with processes.sync_errors():
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
            # Orbax's messages are long; the beginning is enough.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"The checkpoint of step {step} in {self._folder} is intact "
                f"but cannot be restored: {reason}. Nothing was moved."
            ) from error
        sums = tuple(map(none_to_nan, about["sums"]))
        progress = Progress(about["epoch"], about["batch"], sums)
        return TrainState(**found.state), progress


def _tested(workdir: pathlib.Path) -> dict[int, float]:
    """Returns the test accuracy of each recorded step.

    A run that is stopped after the last step of an epoch is saved before it is
    tested.
    """
    try:
        records = read_records(workdir)
    except UserError:  # reported where records are needed
        return {}
    return {one["step"]: one["test_accuracy"] for one in records}
