"""The compiled programs of a run: initialization, training and testing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from train.augment import draw
from train.batching import Batch
from train.experiment import Experiment
from train.pipeline import Feed, Pipeline
from train.recipe import Recipe
from train.state import Sums, TrainState, abstract_state, make_state
from train.step import test_step, train_step
from train.timing import Timer
from train.topology import Topology


class Programs:
    """Compiles programs ahead of time, when they are first asked for.

    Seeds share them: the seed is an argument.

    Args:
      experiment: what to train.
      pipeline: what is read.
    """

    def __init__(self, experiment: Experiment, pipeline: Pipeline):
        self._experiment, self._pipeline = experiment, pipeline
        self._static = experiment.recipe, experiment.topology
        shape = experiment.dataset.train.images.shape[1:]
        self.abstract_state = abstract_state(
            experiment.recipe, shape, experiment.topology
        )
        self._compiled: dict[tuple[Any, ...], Any] = {}

    @functools.cached_property
    def _init_images(self) -> jax.Array:
        """Images that initialize the network, on every device."""
        images = self._experiment.dataset.train.images
        count = self._experiment.recipe.init_images
        return self._experiment.topology.replicate(images[:count])

    def init(self) -> Callable[[int], TrainState]:
        """Returns seed -> state at step 0 on every device."""

        def lower() -> Any:
            program = make_init_program(*self._static)
            return program.lower(self._init_images, np.int32(0))

        program = self._get(("init",), lower)
        return lambda seed: program(self._init_images, np.int32(seed))

    def train(self, num_batches: int, phase: int) -> Callable[..., Any]:
        """Returns (state, feed, seed, epoch) -> (state, Sums).

        Sums are over num_batches batches. The state is donated.
        """

        def lower() -> Any:
            number = np.int32(0)
            feed = self._pipeline.abstract_feed(num_batches, train=True)
            program = make_train_program(
                *self._static, feed, num_batches=num_batches, phase=phase
            )
            return program.lower(self.abstract_state, feed, number, number)

        return self._get(("train", num_batches, phase), lower)

    def test(self, num_batches: int) -> Callable[..., Any]:
        """Returns (variables, feed) -> Sums over num_batches batches."""

        def lower() -> Any:
            feed = self._pipeline.abstract_feed(num_batches, train=False)
            program = make_test_program(
                *self._static, feed, num_batches=num_batches
            )
            return program.lower(self.abstract_state.variables, feed)

        return self._get(("test", num_batches), lower)

    def compile(self, epoch: int = 0, batch: int = 0) -> bool:
        """Compiles what a run needs from a position on; False if there."""
        before = len(self._compiled)
        if not epoch and not batch:
            self.init()
        for num_batches, phase in self._signatures(epoch, batch):
            self.train(num_batches, phase)
        for num_batches in self._pipeline.test_sizes():
            self.test(num_batches)
        return len(self._compiled) > before

    def warm_up(self, epoch: int = 0, batch: int = 0) -> None:
        """Calls the programs of `compile` once: the first call is slower."""
        state, number = self.init()(0), np.int32(0)
        for num_batches, phase in self._signatures(epoch, batch):
            feeds = self._pipeline.train_feeds(
                seed=0, epoch=0, start=0, stop=num_batches, timer=Timer()
            )
            program = self.train(num_batches, phase)
            for _, feed in feeds:
                state, _ = program(state, feed, number, number)
        for num_batches, feed in self._pipeline.test_feeds():
            jax.block_until_ready(self.test(num_batches)(state.variables, feed))

    def _signatures(self, epoch: int, batch: int) -> list[tuple[int, int]]:
        """Returns the (num_batches, phase) of the dispatches that are left."""
        epochs = {  # most epochs are alike
            (steps, self._experiment.recipe.phase(each))
            for each, steps in self._experiment.steps.left(epoch, batch)
        }
        return sorted(
            {
                (num_batches, phase)
                for steps, phase in epochs
                for num_batches in self._pipeline.train_sizes(steps)
            }
        )

    def _get(self, key: tuple[Any, ...], lower: Callable[[], Any]) -> Any:
        if key not in self._compiled:
            self._compiled[key] = lower().compile()
        return self._compiled[key]


def make_init_program(recipe: Recipe, topology: Topology) -> Any:
    """Returns a jitted function (images, seed) -> state on every device.

    Op by op it would take longer than the first epoch on digits.
    """
    return jax.jit(
        functools.partial(make_state, recipe), out_shardings=topology.replicated
    )


def make_train_program(
    recipe: Recipe,
    topology: Topology,
    feed: Feed,
    *,
    num_batches: int,
    phase: int = 0,
) -> Any:
    """Returns a jitted function (state, feed, seed, epoch) -> (state, Sums).

    Loss, gradient and running statistics are those of the global batch. The
    state is donated.

    Args:
      recipe: what a step computes.
      topology: devices of the batch.
      feed: a Feed like those to process; only its structure is used.
      num_batches: one program scans over more than one. Sums are over all of
        them.
      phase: see `Recipe.training_model`.
    """
    step = functools.partial(train_step, recipe, topology.axes, phase)

    def program(
        state: TrainState, feed: Feed, seed: jax.Array, epoch: jax.Array
    ) -> tuple[TrainState, Sums]:
        source, batch = _batches(feed, num_batches)
        images = batch.images if source is None else source
        draws = draw(
            recipe.augmentation,
            batch.index,
            images.shape[-3:],
            seed=seed,
            epoch=epoch,
        )
        if num_batches == 1:
            return step(state, source, batch, draws)
        state, sums = jax.lax.scan(
            lambda state, each: step(state, source, *each),
            state,
            (batch, draws),
        )
        return state, _total(sums)

    specs = P(), _specs(feed, topology), P(), P()
    return jax.jit(
        topology.shard_map(program, specs),
        donate_argnums=0,
        out_shardings=topology.replicated,
    )


def make_test_program(
    recipe: Recipe, topology: Topology, feed: Feed, *, num_batches: int
) -> Any:
    """Returns a jitted function (variables, feed) -> Sums.

    Args:
      recipe, topology, feed, num_batches: see `make_train_program`.
    """
    step = functools.partial(test_step, recipe, topology.axes)

    def program(variables: Any, feed: Feed) -> Sums:
        source, batch = _batches(feed, num_batches)
        if num_batches == 1:
            return step(variables, source, batch)
        _, sums = jax.lax.scan(
            lambda _, each: (None, step(variables, source, each)), None, batch
        )
        return _total(sums)

    specs = P(), _specs(feed, topology)
    return jax.jit(
        topology.shard_map(program, specs), out_shardings=topology.replicated
    )


def _batches(feed: Feed, num_batches: int) -> tuple[jax.Array | None, Batch]:
    """Returns all images or None, and the batches of a dispatch.

    A single batch has no leading axis.
    """
    source, batch, first = feed
    if source is None:
        return None, batch
    index, where = (
        None
        if rows is None
        else jax.lax.dynamic_slice_in_dim(rows, first, num_batches).reshape(
            (num_batches, -1) if num_batches > 1 else -1
        )
        for rows in (batch.index, batch.where)
    )
    if where is None:
        where = jnp.ones(index.shape, bool)
    return source.images, Batch(None, source.labels[index], index, where)


def _specs(feed: Feed, topology: Topology) -> Feed:
    """Returns the sharding of each field: examples over all devices."""
    examples = 1 if feed.batch.index.ndim == 2 else 0
    spec = P(*(None,) * examples, topology.axes)
    return Feed(
        jax.tree.map(lambda _: P(), feed.source),
        jax.tree.map(lambda _: spec, feed.batch),
        P(),
    )


def _total(sums: Sums) -> Sums:
    return jax.tree.map(lambda each: each.sum(0), sums)
