"""A run that was trained before, read back from its workdir."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import defaults
from train import UserError, loop
from train.checkpoint import Checkpoints
from train.step import TrainState, init_state


class Saved(NamedTuple):
    """What `load` returns."""

    config: ConfigDict
    prepared: loop.Prepared  # for the devices here, whoever trained it
    state: TrainState  # of the newest checkpoint
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


def load(run: pathlib.Path) -> Saved:
    """Returns the newest checkpoint of a run, with its data and network.

    Raises:
      UserError: run is no workdir, or has no checkpoint yet.
    """
    config = read_config(run)
    config.mesh = "data"
    prepared = loop.prepare(config)
    shape = prepared.dataset.train.images.shape[1:]
    state = init_state(prepared.recipe, shape, prepared.place.mesh)
    with Checkpoints(run / "checkpoints") as checkpoints:
        found = checkpoints.restore(state)
    if found is None:
        raise UserError(
            f"{run} has no checkpoint yet; the first is written after the "
            "first epoch."
        )
    state, progress = found
    return Saved(config, prepared, state, loop.Progress(**progress))
