"""Moments of the input of each norm layer, over a training batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import PartitionSpec as P

import jaxbn.linen
from train.batching import Batch
from train.experiment import Experiment
from train.step import augmented_images


def make_layer_moments(
    experiment: Experiment, *, seed: int, epoch: int
) -> Callable[[Any, Batch], Any]:
    """Returns a function (variables, batch) -> tree of `jaxbn.Moments`.

    Args:
      experiment: components of the run.
      seed, epoch: determine the augmentation.
    """
    recipe, topology = experiment.recipe, experiment.topology

    def layer_moments(variables: Any, batch: Batch) -> Any:
        images = augmented_images(recipe, batch, seed=seed, epoch=epoch)
        return jaxbn.linen.batch_moments(
            recipe.model, variables, images, train=True
        )

    return topology.shard_map(layer_moments, (P(), P(topology.axes)))
