"""Evaluates averaged weights, with batch statistics recomputed for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxbn import precise
from train import batching
from train.experiment import Experiment
from train.layer_moments import make_layer_moments
from train.state import TrainState


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
    topology, size = experiment.topology, config.batch_size
    seed, epoch = config.seed, experiment.steps.epochs - 1
    rows = batching.train_batches(
        experiment.dataset.train,
        size,
        seed=seed,
        epoch=epoch,
        rows=topology.rows(size),
    )
    found = precise.recompute(
        make_layer_moments(experiment, seed=seed, epoch=epoch),
        variables,
        (topology.put(each, size) for each in itertools.islice(rows, batches)),
    )
    return precise.with_statistics(
        jax.device_get(variables["batch_stats"]), found.stats
    )
