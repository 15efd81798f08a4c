"""A trained network from the folder of its run, without its data set."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from ml_collections import ConfigDict

from train import UserError, data
from train.augment import to_float
from train.experiment import Experiment, make_experiment
from train.files import as_user_error, exists, read_json, write_json
from train.state import abstract_state
from train.topology import Topology
from train.trained_run import read_config, restore, use_one_axis
from train.workdir import with_advice

FILE = "preprocessing.json"


class Preprocessing(NamedTuple):
    """Image shape, number of classes and pixel statistics of the training data.

    Attributes:
      image_shape: (H, W, C) of the images.
      num_classes: length of the logits.
      pixel_mean: (C,) of the training images, in 0..255.
      pixel_std: (C,) likewise.
      examples: of the training split.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    examples: int

    def __call__(self, images: Any) -> jax.Array:
        """Returns what the network sees of uint8 images (N, H, W, C)."""
        images = jnp.asarray(images)
        if images.dtype != jnp.uint8 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must be uint8 of shape (N, "
                f"{', '.join(map(str, self.image_shape))}); got "
                f"{images.dtype}{list(images.shape)}."
            )
        return to_float(images, self.pixel_mean, self.pixel_std)


class Trained(NamedTuple):
    """What `load` returns.

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


def record(workdir: pathlib.Path, experiment: Experiment) -> None:
    """Writes preprocessing.json for `load`, if it does not exist.

    Raises:
      UserError: the workdir cannot be written to.
    """
    path = workdir / FILE
    if exists(path):
        return
    dataset, recipe = experiment.dataset, experiment.recipe
    found = Preprocessing(
        image_shape=tuple(dataset.train.images.shape[1:]),
        num_classes=dataset.num_classes,
        pixel_mean=recipe.pixel_mean,
        pixel_std=recipe.pixel_std,
        examples=len(dataset.train.labels),
    )
    with as_user_error(f"--workdir={workdir}"):
        write_json(path, found._asdict())


def load(run: str | pathlib.Path, *, best: bool = False) -> Trained:
    """Returns the network of a run with the weights of its last checkpoint.

    Needs neither the data set nor as many devices as the run had; the arrays
    lie on the default device.

    Args:
      run: the workdir of `python -m train`.
      best: takes the checkpoint with the best test accuracy instead.

    Returns:
      Trained.

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
    return Trained(
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


def read_preprocessing(run: pathlib.Path) -> Preprocessing:
    """Returns what `record` has written.

    Raises:
      UserError: it is missing or damaged.
    """
    path = run / FILE
    if not exists(path):
        raise UserError(
            f"{path} not found, which says how images are normalized. Rerun "
            "the training command to write it."
        )
    with with_advice("Remove it, and rerun the training command."):
        found = read_json(path)
        try:
            return Preprocessing(
                tuple(map(int, found["image_shape"])),
                int(found["num_classes"]),
                tuple(map(float, found["pixel_mean"])),
                tuple(map(float, found["pixel_std"])),
                int(found["examples"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = json.dumps(str(error))
            raise UserError(f"{path} is damaged: {reason}.") from error
