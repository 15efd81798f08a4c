"""How images become the input of a network, saved for inference."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train import UserError
from train.augment import to_float
from train.experiment import Experiment
from train.files import as_user_error, exists, read_json, write_json
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


def write_preprocessing(workdir: pathlib.Path, experiment: Experiment) -> None:
    """Writes preprocessing.json, if it does not exist.

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


def read_preprocessing(run: pathlib.Path) -> Preprocessing:
    """Returns what `write_preprocessing` has written.

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
