"""A run that was trained before, read back from its workdir."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from configs import defaults
from train import UserError
from train.checkpoint import Checkpoints, Progress
from train.prepared import Prepared, prepare
from train.step import TrainState, abstract_state


class Saved(NamedTuple):
    """What `load` returns."""

    config: ConfigDict
    prepared: Prepared  # for the devices here, whoever trained it
    state: TrainState  # of the checkpoint
    progress: Progress  # at that state


def read_config(run: pathlib.Path) -> ConfigDict:
    """Returns the config of a run; fields that it lacks take their defaults.

    Raises:
      UserError: run is no workdir, or its config.json is damaged.
    """
    path = run / "config.json"
    try:
        then = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{run} holds no run: {path} cannot be read "
            f"({error.strerror}). Give the --workdir of a run."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    config = defaults.get_config()
    config.update(then)
    return config


def use_devices(run: pathlib.Path) -> None:
    """Simulates as many devices as the run had, before any is used.

    For a program of its own: it also silences what orbax says while it reads.

    Raises:
      UserError: run is no workdir.
    """
    devices = read_config(run).cpu_devices
    jax.config.update("jax_num_cpu_devices", devices)
    logging.set_verbosity(logging.ERROR)


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
    prepared = prepare(config)
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
    return Saved(config, prepared, state, progress)
