"""A run that was trained before, read back from its workdir."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from configs import defaults
from train import UserError, data, loop
from train.checkpoint import Checkpoints
from train.step import AXIS, Recipe, TrainState, init_state


class Saved(NamedTuple):
    """What `load` returns."""

    config: ConfigDict
    dataset: data.Dataset
    recipe: Recipe
    mesh: Mesh  # of the devices here, however many had trained it
    state: TrainState  # of the newest checkpoint
    epochs: int  # finished by then


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
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        train_split=config.train_split,
        test_split=config.test_split,
    )
    steps = len(dataset.train.labels) // config.batch_size
    schedule = loop.make_schedule(config, steps)
    recipe = loop.make_recipe(config, dataset, schedule)
    mesh = jax.make_mesh(
        (jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,)
    )
    state = init_state(recipe, dataset.train.images.shape[1:], mesh)
    with Checkpoints(run / "checkpoints") as checkpoints:
        found = checkpoints.restore(state)
    if found is None:
        raise UserError(
            f"{run} has no checkpoint yet; the first is written after the "
            "first epoch."
        )
    return Saved(config, dataset, recipe, mesh, *found)
