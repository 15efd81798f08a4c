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
    test: Callable[[Any, Any], tuple[float, float]],
) -> dict[str, float]:
    """Returns loss and accuracy of the averaged weights.

    The running statistics belong to the weights of each step. For the average
    they are recomputed over config.precise_batches training batches.
    """
    batch_stats = precise_statistics(
        config,
        experiment,
        state.average,
        state.batch_stats,
        batches=config.precise_batches,
    )
    loss, accuracy = test(state.average, batch_stats)
    return {"average_test_loss": loss, "average_test_accuracy": accuracy}


def precise_statistics(
    config: ConfigDict,
    experiment: Experiment,
    params: Any,
    batch_stats: Any,
    *,
    batches: int,
) -> Any:
    """Returns batch_stats recomputed for params over training batches.

    Args:
      config: config of the run; its norm must not be "flax" or "none".
      experiment: data and model of the run.
      params: parameters to compute the statistics for.
      batch_stats: running statistics; entries not recomputed are kept.
      batches: number of batches to read, at most one epoch.
    """
    topology, dataset, _, _, recipe = experiment
    size, epoch = config.batch_size, config.epochs - 1
    read = jax.shard_map(
        functools.partial(_moments, recipe),
        mesh=topology.mesh,
        in_specs=(P(), (P(topology.axes), P())),
        out_specs=P(),
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
        {"params": params, "batch_stats": batch_stats},
        (
            (topology.put(rows, size), epoch)
            for rows in itertools.islice(read_from, batches)
        ),
    )
    return precise.with_statistics(jax.device_get(batch_stats), found.stats)


def _moments(
    recipe: Recipe, variables: dict[str, Any], given: tuple[Any, Any]
) -> Any:
    batch, epoch = given
    return jaxbn.linen.batch_moments(
        recipe.model,
        variables,
        augmented_images(recipe, batch, epoch),
        train=True,
    )
