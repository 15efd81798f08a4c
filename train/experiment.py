"""Builds devices, data, model and schedule from a config."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from train import data, processes
from train.duration import Steps, count_steps
from train.recipe import Recipe, check_config, make_recipe
from train.schedules import make_schedule
from train.topology import Topology, make_topology


class Experiment(NamedTuple):
    """The components of a run that a config describes."""

    topology: Topology
    dataset: data.Dataset
    steps: Steps
    schedule: optax.Schedule
    recipe: Recipe


def build_experiment(
    config: ConfigDict, *, download: bool = True
) -> Experiment:
    """Builds the components of a run; writes nothing to the workdir.

    Args:
      config: config of the run.
      download: False only uses data that is already prepared.

    Raises:
      UserError: the config is invalid, with what to change.
    """
    check_config(config)
    topology = make_topology(
        config.mesh, config.batch_size, config.microbatches
    )
    with processes.sync_errors():  # each host reads its own data
        dataset = data.load_dataset(
            config.dataset,
            data_dir=config.data_dir,
            train_split=config.train_split,
            test_split=config.test_split,
            lazy=jax.process_count() > 1,
            download=download,
        )
    return make_experiment(config, topology, dataset)


def make_experiment(
    config: ConfigDict, topology: Topology, dataset: data.Dataset
) -> Experiment:
    """Builds schedule and recipe for given devices and data.

    Raises:
      UserError: the config does not fit the devices or the data.
    """
    steps = count_steps(config, dataset)
    schedule = make_schedule(
        config, steps=steps.total, steps_per_epoch=steps.per_epoch
    )
    recipe = make_recipe(config, dataset, steps, schedule, topology)
    return Experiment(topology, dataset, steps, schedule, recipe)
