"""A small config and a small recipe for training on digits."""

import functools

import jax
from jax.sharding import AxisType

from configs import digits
from jaxbn.linen import BatchNorm
from train.resnet import ResNet
from train.state import Recipe, make_optimizer


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
    optimizer = make_optimizer(
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
        padding=1,
        flip=True,
        seed=0,
    )
    return recipe._replace(**changes)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
