"""Loads the network of a run for inference, without its data set."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType
from ml_collections import ConfigDict

from train import data
from train.experiment import Experiment, make_experiment
from train.preprocessing import Preprocessing, read_preprocessing
from train.state import abstract_state
from train.topology import Topology
from train.trained_run import read_config, restore, use_one_axis


class TrainedNetwork(NamedTuple):
    """A trained network, with the preprocessing of its images.

    Attributes:
      model: model.apply(variables, preprocess(images), train=False) are the
        logits (N, num_classes), float32.
      variables: params, batch_stats and, where there are any, frozen.
      preprocess: from uint8 images (N, H, W, C) to what the model takes.
      config: of the run.
      step: training steps that were taken.
    """

    model: nn.Module
    variables: dict[str, Any]
    preprocess: Preprocessing
    config: ConfigDict
    step: int

    def logits(self, images: Any) -> jax.Array:
        """Returns the logits of uint8 images, (N, num_classes)."""
        logits: jax.Array = self.model.apply(
            self.variables, self.preprocess(images), train=False
        )
        return logits


def load(run: str | pathlib.Path, *, best: bool = False) -> TrainedNetwork:
    """Returns the network of a run with the weights of its last checkpoint.

    Needs neither the data set nor as many devices as the run had; the arrays
    lie on the default device.

    Args:
      run: the workdir of `python -m train`.
      best: takes the checkpoint with the best test accuracy instead.

    Raises:
      UserError: run is no workdir, has no such checkpoint, or one of its files
        is damaged.

    Example:
      trained = load("runs/r20")
      # uint8 images, (N, 32, 32, 3)
      classes = trained.logits(images).argmax(-1)
    """
    run = pathlib.Path(run)
    config, preprocess = read_config(run), read_preprocessing(run)
    experiment = inference_experiment(config, preprocess)
    recipe, topology = experiment.recipe, experiment.topology
    like = abstract_state(recipe, preprocess.image_shape, topology)
    state, _ = restore(run, like, best=best)
    return TrainedNetwork(
        model=recipe.model,
        variables=state.variables,
        preprocess=preprocess,
        config=config,
        step=int(state.step),
    )


def inference_experiment(
    config: ConfigDict, preprocess: Preprocessing
) -> Experiment:
    """Returns the components of a run on a single device, without its data."""
    # Of the data only sizes are read, and its pixels are known.
    blank = data.Split(
        np.zeros((1, *preprocess.image_shape), np.uint8),
        np.broadcast_to(np.int32(0), preprocess.examples),
    )
    dataset = data.Dataset(blank, blank, preprocess.num_classes)
    mesh = jax.make_mesh(
        (1,), ("data",), (AxisType.Auto,), devices=jax.local_devices()[:1]
    )
    use_one_axis(config)
    return make_experiment(config, Topology(mesh), dataset)
