"""Checkpoints of a run, by orbax."""

from __future__ import annotations

import pathlib
from typing import Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.step import TrainState

KEEP = 2  # a crash while the newest is written leaves the one before


class Checkpoints:
    """Saves and restores TrainState under a folder; use as a context."""

    def __init__(self, folder: pathlib.Path):
        # A policy, not max_to_keep: that one can delete the newest.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(KEEP)
        )
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for what is still being written

    def save(self, state: TrainState, *, epochs: int) -> None:
        """Writes the state in the background; epochs are those finished."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                progress=ocp.args.JsonSave({"epochs": epochs}),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, int] | None:
        """Returns (state, epochs finished) of the newest, or None.

        Args:
          like: a state of the run. What is read gets its shapes, dtypes and
            devices, however many devices had written it.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract._asdict()),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**found.state), found.progress["epochs"]
