"""Evaluates averaged weights, with batch statistics recomputed for them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import jaxbn.linen
from jaxbn import precise
from train import batching
from train.experiment import Experiment
from train.state import Recipe, TrainState
from train.step import augmented_images


def evaluate_average(
    config: ConfigDict,
    experiment: Experiment,
    state: TrainState,
    test: Callable[[Any], dict[str, float]],
) -> dict[str, float]:
    """Returns loss and accuracy of the averaged weights.

    The running statistics belong to the weights of each step. For the average
    they are recomputed over config.precise_batches training batches.
    """
    variables = state._replace(params=state.average).variables
    variables["batch_stats"] = precise_statistics(
        config, experiment, variables, batches=config.precise_batches
    )
    return {f"average_{key}": value for key, value in test(variables).items()}


def precise_statistics(
    config: ConfigDict,
    experiment: Experiment,
    variables: dict[str, Any],
    *,
    batches: int,
) -> Any:
    """Returns batch_stats recomputed over training batches.

    Args:
      config: config of the run; its norm must not be "flax" or "none".
      experiment: data and model of the run.
      variables: of the network; running statistics that are not recomputed
        are kept.
      batches: number of batches to read, at most one epoch.
    """
    topology, dataset, steps, _, recipe = experiment
    size, epoch = config.batch_size, steps.epochs - 1
    read = topology.shard_map(
        functools.partial(_moments, recipe, config.seed, epoch),
        (P(), P(topology.axes)),
    )
    read_from = batching.train_batches(
        dataset.train,
        size,
        seed=config.seed,
        epoch=epoch,
        rows=topology.rows(size),
    )
    found = precise.recompute(
        read,
        variables,
        (
            topology.put(rows, size)
            for rows in itertools.islice(read_from, batches)
        ),
    )
    return precise.with_statistics(
        jax.device_get(variables["batch_stats"]), found.stats
    )


def _moments(
    recipe: Recipe, seed: int, epoch: int, variables: Any, batch: Any
) -> Any:
    return jaxbn.linen.batch_moments(
        recipe.model,
        variables,
        augmented_images(recipe, batch, seed=seed, epoch=epoch),
        train=True,
    )
