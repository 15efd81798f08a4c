"""The steps of train and train.fast, as their loops compile them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import train.fast.recipe
import train.recipe
from configs import cifar10_94, resnet18_cifar
from tests.bench.compiled_programs import Program
from tests.bench.gpu_nets import ResNet50
from train.batching import Batch
from train.data import Dataset, Split
from train.fast import programs
from train.fast.step import init_state
from train.norms import norm_of
from train.state import Recipe, abstract_state
from train.step import make_train_step
from train.topology import Topology

# A run has 50,000 images; what stands for them needs no more than their size.
EXAMPLES = 50_000


def resnet18_step(mesh: Mesh, norm: str, batch: int) -> Program:
    """The step of configs/resnet18_cifar.py, in bfloat16."""
    return _step(mesh, _recipe(mesh, norm, batch, 32, 10), batch, 32)


def resnet50_step(mesh: Mesh, norm: str, batch: int) -> Program:
    """The same step with ResNet-50 and images of 224 pixels."""
    recipe = _recipe(mesh, norm, batch, 224, 1000)
    model = ResNet50(1000, norm=recipe.model.norm, dtype=jnp.bfloat16)
    return _step(mesh, recipe._replace(model=model), batch, 224)


def fast_epoch(mesh: Mesh, norm: str, batch: int) -> Program:
    """An epoch of configs/cifar10_94.py as one program.

    In the config's float16 on GPUs, and in bfloat16 on TPUs.

    Args:
      mesh: that each batch is split over.
      norm: of the network.
      batch: of all devices together.
    """
    config = _config(cifar10_94, norm)
    config.batch_size, config.devices = batch, mesh.size
    if mesh.devices.flat[0].platform == "tpu":
        config.dtype = "bfloat16"
    make = _norm(config, mesh, norm)
    if norm != "none":
        make = functools.partial(make, use_scale=False)
        if mesh.size == 1:
            make = functools.partial(make, axis_name=None)
    recipe = train.fast.recipe.make_recipe(config, _dataset(32, 10), make)
    split = Split(
        jax.ShapeDtypeStruct((EXAMPLES, 32, 32, 3), jnp.uint8),
        jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32),
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(functools.partial(init_state, recipe), split, number)
    kind = programs.epoch_signature(recipe, recipe.bias_epochs)
    epoch = functools.partial(programs._scanned_epoch, recipe, *kind)
    jitted = programs._jitted(mesh, epoch, 0)
    return Program(jitted, (state, split, number, number))


def _step(mesh: Mesh, recipe: Recipe, batch: int, side: int) -> Program:
    shape, size = (side, side, 3), batch * mesh.size

    def rows(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (size, *dims), dtype, sharding=Topology(mesh).batch
        )

    arguments = (
        abstract_state(recipe, shape, mesh),
        Batch(
            images=rows(jnp.uint8, *shape),
            labels=rows(jnp.int32),
            index=rows(jnp.int32),
            where=rows(jnp.bool_),
        ),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
    )
    return Program(make_train_step(recipe, mesh), arguments)


def _recipe(
    mesh: Mesh, norm: str, batch: int, side: int, classes: int
) -> Recipe:
    config = _config(resnet18_cifar, norm)
    config.batch_size = batch * mesh.size
    config.dtype = "bfloat16"
    dataset = _dataset(side, classes)
    schedule = train.recipe.make_schedule(
        config, max(EXAMPLES // config.batch_size, 1)
    )
    recipe = train.recipe.make_recipe(config, dataset, schedule, Topology(mesh))
    model = recipe.model.clone(norm=_norm(config, mesh, norm))
    return recipe._replace(model=model)


def _config(module: Any, norm: str) -> ConfigDict:
    config = module.get_config()
    config.norm = "flax" if norm == "stable" else norm
    return config


def _norm(config: ConfigDict, mesh: Mesh, norm: str) -> Any:
    make = norm_of(config, Topology(mesh))
    if norm == "stable":
        make = functools.partial(make, use_fast_variance=False)
    return make


def _dataset(side: int, classes: int) -> Dataset:
    """Returns random pixels of a few images, and labels of all."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8)
    split = Split(images, np.zeros(EXAMPLES, np.int32))
    return Dataset(split, split, classes)
