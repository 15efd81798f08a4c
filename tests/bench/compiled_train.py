"""The programs of train, as its loop compiles them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import cifar10_94, resnet18_cifar
from tests.bench.compiled_programs import Program
from tests.bench.gpu_nets import ResNet50
from train.batching import Batch
from train.data import Dataset, Split
from train.experiment import make_experiment
from train.pipeline import Feed, abstract_batch
from train.programs import make_train_program
from train.recipe import Recipe
from train.state import abstract_state
from train.topology import Topology

# A run has 50,000 images; what stands for them needs no more than their size.
EXAMPLES = 50_000


def resnet18_step(mesh: Mesh, norm: str, batch: int) -> Program:
    """The step of configs/resnet18_cifar.py, in bfloat16."""
    return _step(mesh, _resnet(mesh, norm, batch, 32, 10), batch, 32)


def resnet50_step(mesh: Mesh, norm: str, batch: int) -> Program:
    """The same step with ResNet-50 and images of 224 pixels."""
    recipe = _resnet(mesh, norm, batch, 224, 1000)
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
    config.batch_size = batch
    if mesh.devices.flat[0].platform == "tpu":
        config.dtype = "bfloat16"
    topology = Topology(mesh)
    recipe = _recipe(config, topology, norm, 32, 10)
    steps = EXAMPLES // batch
    replicated = {"sharding": topology.replicated}
    source = Split(
        jax.ShapeDtypeStruct((EXAMPLES, 32, 32, 3), jnp.uint8, **replicated),
        jax.ShapeDtypeStruct((EXAMPLES,), jnp.int32, **replicated),
    )
    index = abstract_batch(topology, (steps, batch), ()).index
    feed = Feed(source, Batch(None, None, index, None), np.int32(0))
    # The last phase, in which the whitening bias is frozen.
    program = make_train_program(
        recipe, topology, feed, num_batches=steps, phase=1
    )
    return _program(program, recipe, topology, feed, 32)


def _step(mesh: Mesh, recipe: Recipe, batch: int, side: int) -> Program:
    topology = Topology(mesh)
    rows = abstract_batch(topology, (batch * mesh.size,), (side, side, 3))
    feed = Feed(None, rows, np.int32(0))
    program = make_train_program(recipe, topology, feed, num_batches=1)
    return _program(program, recipe, topology, feed, side)


def _program(
    program: Any, recipe: Recipe, topology: Topology, feed: Feed, side: int
) -> Program:
    state = abstract_state(recipe, (side, side, 3), topology)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=topology.replicated)
    feed = feed._replace(first=number)
    return Program(program, (state, feed, number, number))


def _resnet(
    mesh: Mesh, norm: str, batch: int, side: int, classes: int
) -> Recipe:
    config = _config(resnet18_cifar, norm)
    config.batch_size = batch * mesh.size
    config.dtype = "bfloat16"
    return _recipe(config, Topology(mesh), norm, side, classes)


def _recipe(
    config: ConfigDict, topology: Topology, norm: str, side: int, classes: int
) -> Recipe:
    dataset = _dataset(side, classes)
    # On large meshes there may be no full batch; rates do not matter here.
    config.batch_size = min(config.batch_size, EXAMPLES)
    recipe = make_experiment(config, topology, dataset).recipe
    if norm != "stable":
        return recipe
    stable = functools.partial(recipe.model.norm, use_fast_variance=False)
    phases = tuple(
        phase._replace(model=phase.model.clone(norm=stable))
        for phase in recipe.phases
    )
    return recipe._replace(model=recipe.model.clone(norm=stable), phases=phases)


def _config(module: Any, norm: str) -> ConfigDict:
    config = module.get_config()
    config.norm = "flax" if norm == "stable" else norm
    return config


def _dataset(side: int, classes: int) -> Dataset:
    """Returns random pixels of a few images, and labels of all."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8)
    split = Split(images, np.zeros(EXAMPLES, np.int32))
    return Dataset(split, split, classes)
