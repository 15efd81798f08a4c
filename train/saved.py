"""A run that was trained before, read back from its workdir."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import defaults
from train import UserError, loop
from train.checkpoint import Checkpoints
from train.step import TrainState, abstract_state


class Saved(NamedTuple):
    """What `load` returns."""

    config: ConfigDict
    prepared: loop.Prepared  # for the devices here, whoever trained it
    state: TrainState  # of the checkpoint
    progress: loop.Progress  # at that state


def read_config(run: pathlib.Path) -> ConfigDict:
    """Returns the config of a run; fields that it lacks take their defaults.

    Raises:
      UserError: run is no workdir.
    """
    path = run / "config.json"
    try:
        then = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{run} holds no run: {path} cannot be read "
            f"({error.strerror}). Give the --workdir of a run."
        ) from error
    config = defaults.get_config()
    config.update(then)
    return config


def load(run: pathlib.Path, *, best: bool = False) -> Saved:
    """Returns the newest checkpoint of a run, with its data and network.

    The folder stays as it is: the run may go on meanwhile.

    Args:
      run: its workdir.
      best: takes the checkpoint with the best test accuracy instead.

    Raises:
      UserError: run is no workdir, or has no such checkpoint yet.
    """
    config = read_config(run)
    config.mesh = "data"
    prepared = loop.prepare(config)
    shape = prepared.dataset.train.images.shape[1:]
    like = abstract_state(prepared.recipe, shape, prepared.place.mesh)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(like, best=best)
    if found is None:
        raise UserError(
            f"{run} has no checkpoint{' with a test' if best else ''} yet; the "
            "first is written after the first epoch."
        )
    state, progress = found
    return Saved(config, prepared, state, loop.Progress(**progress))
