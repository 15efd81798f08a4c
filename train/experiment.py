"""What a config stands for: devices, data, network and schedule."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from train import data, processes
from train.recipe import (
    check,
    make_recipe,
    make_schedule,
    steps_per_epoch,
)
from train.step import Recipe
from train.topology import Topology, make_topology


class Experiment(NamedTuple):
    """What a config stands for, before anything is written."""

    topology: Topology
    dataset: data.Dataset
    steps: int  # of an epoch
    schedule: optax.Schedule
    recipe: Recipe


def build_experiment(
    config: ConfigDict, *, download: bool = True
) -> Experiment:
    """Reads the data and makes the recipe.

    Args:
      config: of the run.
      download: False takes only data that is there already.

    Raises:
      UserError: the config cannot be run, with what to change.
    """
    check(config)
    topology = make_topology(
        config.mesh, config.batch_size, config.microbatches
    )
    with processes.together():  # each host has data of its own
        dataset = data.load(
            config.dataset,
            data_dir=config.data_dir,
            train_split=config.train_split,
            test_split=config.test_split,
            lazy=jax.process_count() > 1,
            download=download,
        )
    steps = steps_per_epoch(config, dataset)
    schedule = make_schedule(config, steps)
    recipe = make_recipe(config, dataset, schedule, topology)
    return Experiment(topology, dataset, steps, schedule, recipe)
