"""Finds the layers that make a loss nonfinite."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import jaxbn
import jaxbn.linen
from train import batching
from train.experiment import Experiment
from train.state import Recipe, TrainState
from train.step import augmented_images

MAX_LISTED = 5


def describe_nonfinite(
    config: ConfigDict, experiment: Experiment, state: TrainState, epoch: int
) -> str:
    """Describes the step, and the layers' batch statistics in it.

    Args:
      config: config of the run.
      experiment: components of the run.
      state: state before the nonfinite batch.
      epoch: epoch of the batch, from 0.
    """
    topology, dataset, steps, _, recipe = experiment
    step = int(state.step)
    number = step - epoch * steps.per_epoch
    text = (
        f"The loss or a gradient is not finite at step {step + 1} (epoch "
        f"{epoch + 1}, batch {number + 1})."
    )
    if config.norm in ("flax", "none"):
        return text
    size = config.batch_size
    rows = next(
        batching.train_batches(
            dataset.train,
            size,
            seed=config.seed,
            epoch=epoch,
            start=number,
            rows=topology.rows(size),
        )
    )
    read = jax.jit(
        topology.shard_map(
            functools.partial(_moments, recipe, config.seed, epoch),
            (P(), P(topology.axes)),
        )
    )
    tree = read(state.variables, topology.put(rows, size))
    return f"{text} {_describe_layers(jax.device_get(tree))}"


def _moments(
    recipe: Recipe, seed: int, epoch: int, variables: Any, batch: Any
) -> Any:
    images = augmented_images(recipe, batch, seed=seed, epoch=epoch)
    return jaxbn.linen.batch_moments(
        recipe.model, variables, images, train=True
    )


def _describe_layers(tree: Any) -> str:
    layers = {
        "/".join(key.key for key in path): moments
        for path, moments in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, jaxbn.Moments)
        )
    }
    bad = [name for name, m in layers.items() if not jaxbn.is_finite(m)]
    if bad:
        more = (
            f" and {len(bad) - MAX_LISTED} more"
            if len(bad) > MAX_LISTED
            else ""
        )
        return (
            f"Layers with nonfinite input: {', '.join(bad[:MAX_LISTED])}{more}."
        )
    size = {name: float(np.sqrt(m.var.max())) for name, m in layers.items()}
    largest = sorted(size, key=size.get, reverse=True)[:MAX_LISTED]
    listed = ", ".join(f"{name} {size[name]:.3g}" for name in largest)
    return (
        "The inputs of all layers are finite; the largest standard deviations "
        f"are {listed}."
    )
