"""A small config and a small recipe for training on digits."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType

from configs import digits
from jaxbn.linen import BatchNorm
from train.augment import Augmentation
from train.batching import Batch
from train.optimizer import sgd
from train.pipeline import Feed
from train.programs import (
    make_init_program,
    make_test_program,
    make_train_program,
)
from train.recipe import Recipe
from train.resnet import ResNet
from train.topology import Topology


def small_config(**changes):
    config = digits.get_config()
    config.update(
        width=4,
        epochs=3,
        batch_size=64,
        test_batch_size=64,
        train_split="train[:256]",
        test_split="test[:100]",
    )
    config.update(changes)
    return config.lock()


def make_recipe(**changes):
    optimizer = sgd(
        lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4
    )
    recipe = Recipe(
        model=ResNet(
            depth=8,
            num_classes=10,
            width=4,
            norm=functools.partial(BatchNorm, momentum=0.9, axis_name="data"),
        ),
        optimizer=optimizer,
        pixel_mean=(80.0,),
        pixel_std=(90.0,),
        augmentation=Augmentation(padding=1, flip="random"),
    )
    return recipe._replace(**changes)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def init_state(recipe, shape, mesh, seed=0):
    images = np.zeros((1, *shape), np.uint8)
    return make_init_program(recipe, Topology(mesh))(images, seed)


def train_program(recipe, mesh, steps=1):
    """Returns (state, batch, epoch) -> (state, Sums) of seed 0."""
    like = Feed(None, Batch(*[np.zeros((1, 1)[steps == 1 :])] * 4), 0)
    program = make_train_program(
        recipe, Topology(mesh), like, num_batches=steps
    )
    return lambda state, batch, epoch: program(
        state, Feed(None, batch, 0), 0, epoch
    )


def test_program(recipe, mesh):
    """Returns (variables, batch) -> Sums."""
    like = Feed(None, Batch(*[np.zeros(1)] * 4), 0)
    program = make_test_program(recipe, Topology(mesh), like, num_batches=1)
    return lambda variables, batch: program(variables, Feed(None, batch, 0))


test_program.__test__ = False
