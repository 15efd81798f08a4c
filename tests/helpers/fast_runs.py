"""A small fast run on images made here, and its programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from configs import cifar10_94
from jaxbn.linen import BatchNorm
from train import data
from train.fast import programs, step
from train.fast.recipe import MIN_IMAGE_SIZE, make_recipe

CLASSES = 10
STEPS = 9  # one epoch of six, and half of one
TEST = 37  # no multiple of its batch


def examples(count, seed):
    """Images of 16x16 whose class shows in their colours."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    colour = np.random.default_rng(99).uniform(60, 200, (CLASSES, 1, 1, 3))
    noise = rng.normal(0, 30, (count, MIN_IMAGE_SIZE, MIN_IMAGE_SIZE, 3))
    images = np.clip(colour[labels] + noise, 0, 255).astype(np.uint8)
    return data.Split(images, labels)


DATASET = data.Dataset(examples(100, 0), examples(TEST, 1), CLASSES)


def small(argument="", **changes):
    config = cifar10_94.get_config(argument)
    config.widths = (8, 12)  # less to compile
    config.dtype = "float32"
    config.batch_size, config.test_batch_size = 16, 10
    config.epochs = 1.5
    config.whitening_bias_epochs = 1
    config.lookahead_every = 3
    config.seeds = 1
    config.update(changes)
    return config


def norm_of(**fields):
    fields = {"momentum": 0.6, "epsilon": 1e-12, **fields}
    return functools.partial(BatchNorm, use_scale=False, **fields)


def recipe_of(config):
    axis_name = "data" if config.devices > 1 else None
    return make_recipe(config, DATASET, norm_of(axis_name=axis_name))


def mesh_of(devices):
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def compiled(recipe, *, scan):
    return programs.compile_programs(recipe, DATASET, mesh_of(1), scan=scan)


def trained(made, recipe, seed=0):
    """Returns the states at the start and after each epoch, and all losses."""
    states, losses = [made.init(seed)], []
    for epoch in range(programs.epochs(recipe)):
        kept = jax.tree.map(jnp.copy, states[-1])
        state, found = made.epoch(states[-1], seed, epoch)
        states[-1] = kept
        states.append(state)
        losses.extend(np.asarray(jax.device_get(found)).tolist())
    return states, losses


@functools.cache
def plan_program(cutout=0):
    """The program that plans an epoch of `DATASET`, by (seed, epoch)."""
    recipe = recipe_of(small(cutout=cutout))
    return jax.jit(functools.partial(step.plan_epoch, recipe, DATASET.train))


def first_batch(cutout=0):
    return jax.tree.map(
        lambda a: a[0], jax.device_get(plan_program(cutout)(0, 0))
    )
