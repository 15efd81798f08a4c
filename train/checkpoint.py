"""Checkpoints of a run, by orbax."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train import UserError
from train.step import Sums, TrainState

# JAX wants a number that rises in the life of a process, over all its runs.
_QUESTIONS = itertools.count(1)

KEEP = 2  # a crash while the newest is written leaves the one before


class Progress(NamedTuple):
    """Where in the run a state is; kept beside it in a checkpoint."""

    epoch: int = 0  # finished epochs
    batch: int = 0  # finished batches of the next one
    sums: tuple[float, ...] = (0.0,) * len(Sums._fields)  # over these


class Checkpoints:
    """Saves and restores TrainState under a folder; use as a context.

    Keeps the newest two, and the one with the best test accuracy. Writes in the
    background, from all processes; a checkpoint is there whole or not at all.

    Args:
      folder: that they lie in.
      read_only: leaves the folder as it is, for a run that may go on meanwhile.
    """

    def __init__(self, folder: pathlib.Path, *, read_only: bool = False):
        self._folder = folder.absolute()
        self._read_only = read_only
        policies = preservation_policy
        # Policies, not max_to_keep: with a best_fn that deletes the newest.
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(KEEP),
                policies.BestN(get_metric_fn=_accuracy, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else keep,
            best_fn=_accuracy,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        with _clear_errors(self._folder, None):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # What went wrong is known already.
            with contextlib.suppress(Exception):
                self._manager.close()
            return
        with _clear_errors(self._folder, self._manager):
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
        measured = UNTESTED if test_accuracy is None else test_accuracy
        with _clear_errors(self._folder, self._manager):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    progress=ocp.args.JsonSave(progress._asdict()),
                ),
                metrics={"test_accuracy": measured},
            )

    def wait(self) -> None:
        """Returns once everything is written."""
        with _clear_errors(self._folder, self._manager):
            self._manager.wait_until_finished()

    def preempted(self) -> bool:
        """Whether the machines are to be given back; all processes agree.

        Each has to ask equally often: they agree on one of the questions.
        """
        return jax.process_count() > 1 and self._manager.reached_preemption(
            next(_QUESTIONS)
        )

    def restore(
        self, like: TrainState, *, best: bool = False
    ) -> tuple[TrainState, Progress] | None:
        """Returns (state, progress) of the newest that can be read, or None.

        One that is damaged is put aside, or if read_only passed over, with a
        warning.

        Args:
          like: of `abstract_state`. What is read gets its shapes, dtypes and
            devices, however many devices had written it.
          best: takes the one with the best test accuracy; None also where
            none has a test.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        if best:
            step = self._manager.best_step()
            if step is None or _accuracy(self._manager.metrics(step)) < 0:
                return None
            return self._read(step, like)
        damaged = []
        while left := sorted({*self._manager.all_steps()} - {*damaged}):
            try:
                return self._read(left[-1], like)
            except Exception as error:  # whatever a damaged file leads to
                damaged.append(left[-1])
                self._put_aside(left[-1], error)
        if damaged:
            put = "" if self._read_only else "; they were put aside"
            raise UserError(
                f"No checkpoint in {self._folder} can be read{put}: those of "
                f"the steps {', '.join(map(str, damaged))}. Start anew in "
                "another --workdir, or mend them."
            )
        return None

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like._asdict()),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**found.state), Progress(**found.progress)

    def _put_aside(self, step: int, error: Exception) -> None:
        aside = self._folder.parent / f"damaged-checkpoint-{step}"
        if jax.process_index() == 0:
            if not self._read_only and (self._folder / str(step)).exists():
                os.replace(self._folder / str(step), aside)
            # Orbax reports in many lines; the first says what it is.
            reason = " ".join(str(error).split())[:200]
            now = "" if self._read_only else f" and is now {aside}"
            warnings.warn(
                f"The checkpoint of step {step} cannot be read{now}; going on "
                f"from the one before. ({reason})",
                stacklevel=2,
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside {step}")
        self._manager.reload()


UNTESTED = -1.0  # so that it is never the best


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["test_accuracy"]


# What the system says when a file cannot be written, in orbax's words.
_SYSTEM = re.compile(
    r"no space left|file too large|disk quota|read-only file|permission denied"
    r"|input/output error",
    re.IGNORECASE,
)


@contextlib.contextmanager
def _clear_errors(
    folder: pathlib.Path, manager: ocp.CheckpointManager | None
) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _SYSTEM.search(str(error))
        if not reason and not isinstance(error, OSError):
            raise
        whole = None if manager is None else _newest(manager)
        raise UserError(
            f"Cannot write a checkpoint to {folder}: "
            f"{reason[0].lower() if reason else error}. {what_is_left(whole)}"
        ) from error


def _newest(manager: ocp.CheckpointManager) -> int | None:
    """What lies in the folder; orbax counts what it is writing as well."""
    with contextlib.suppress(Exception):
        manager.wait_until_finished()
    return max(manager.all_steps(read=True), default=None)


def what_is_left(step: int | None) -> str:
    """Says from where a run goes on that could not write."""
    if step is None:
        return "There is no checkpoint."
    return (
        f"The checkpoint of step {step} is whole: the same command goes on "
        "from there."
    )
