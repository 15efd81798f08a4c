"""Checkpoints of a run, by orbax."""

from __future__ import annotations

import pathlib
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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

    def restore(self, like: Any, mesh: Mesh) -> tuple[TrainState, int] | None:
        """Returns (state, epochs finished) of the newest, or None.

        Args:
          like: TrainState of arrays or shapes.
          mesh: the state is put on all of its devices, however many had
            written it.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        everywhere = NamedSharding(mesh, P())
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=everywhere
            ),
            like._asdict(),
        )
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**found.state), found.progress["epochs"]
