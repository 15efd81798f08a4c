"""The compiled programs of a run: initialization, training and testing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from train.augment import draw
from train.batching import Batch
from train.experiment import Experiment
from train.pipeline import Feed, Pipeline
from train.state import Recipe, Sums, TrainState, abstract_state, make_state
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
        # Images that initialize the network, on every device.
        self._first = experiment.topology.replicate(
            experiment.dataset.train.images[: experiment.recipe.init_images]
        )

    def init(self, seed: int) -> TrainState:
        """Returns the state at step 0 on every device."""

        def lower() -> Any:
            program = make_init_program(*self._static)
            return program.lower(self._first, np.int32(0))

        return self._get(("init",), lower)(self._first, np.int32(seed))

    def train(self, size: int, phase: int) -> Callable[..., Any]:
        """Returns (state, feed, seed, epoch) -> (state, Sums) of size batches.

        The state is donated.
        """

        def lower() -> Any:
            number = np.int32(0)
            feed = self._pipeline.abstract_feed(size, train=True)
            program = make_train_program(
                *self._static, feed, size=size, phase=phase
            )
            return program.lower(self.abstract_state, feed, number, number)

        return self._get(("train", size, phase), lower)

    def test(self, size: int) -> Callable[..., Any]:
        """Returns (variables, feed) -> Sums over size batches."""

        def lower() -> Any:
            feed = self._pipeline.abstract_feed(size, train=False)
            program = make_test_program(*self._static, feed, size=size)
            return program.lower(self.abstract_state.variables, feed)

        return self._get(("test", size), lower)

    def compile(self, epoch: int = 0, batch: int = 0) -> bool:
        """Compiles what a run needs from a position on; False if there."""
        before = len(self._compiled)
        if not epoch and not batch:
            self.init(0)
        for _, (size, phase) in self._dispatches(epoch, batch):
            self.train(size, phase)
        for size in self._pipeline.test_sizes():
            self.test(size)
        return len(self._compiled) > before

    def warm_up(self, epoch: int = 0, batch: int = 0) -> None:
        """Calls the programs of `compile` once: the first call is slower."""
        state, number = self.init(0), np.int32(0)
        for size, phase in {each for _, each in self._dispatches(epoch, batch)}:
            feeds = self._pipeline.train_feeds(
                seed=0, epoch=0, start=0, stop=size, timer=Timer()
            )
            for _, feed in feeds:
                state, _ = self.train(size, phase)(state, feed, number, number)
        for size, feed in self._pipeline.test_feeds():
            jax.block_until_ready(self.test(size)(state.variables, feed))

    def _dispatches(
        self, first: int, batch: int
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yields (epoch, (size, phase)) of the dispatches of a run."""
        steps, recipe = self._experiment.steps, self._experiment.recipe
        for epoch in range(first, steps.epochs):
            left = steps.of(epoch) - (batch if epoch == first else 0)
            for size in {*self._pipeline.train_sizes(left)}:
                yield epoch, (size, recipe.phase(epoch))

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
    size: int,
    phase: int = 0,
) -> Any:
    """Returns a jitted function (state, feed, seed, epoch) -> (state, Sums).

    Loss, gradient and running statistics are those of the global batch. The
    state is donated.

    Args:
      recipe: what a step computes.
      topology: devices of the batch.
      feed: a Feed like those to process; only its structure is used.
      size: number of batches; one program scans over more than one. Sums are
        over all of them.
      phase: see `Recipe.training_model`.
    """
    step = functools.partial(train_step, recipe, topology.axes, phase)

    def program(
        state: TrainState, feed: Feed, seed: jax.Array, epoch: jax.Array
    ) -> tuple[TrainState, Sums]:
        source, batch = _batches(feed, size)
        images = batch.images if source is None else source
        draws = draw(
            recipe.augmentation,
            batch.index,
            images.shape[-3:],
            seed=seed,
            epoch=epoch,
        )
        if size == 1:
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
    recipe: Recipe, topology: Topology, feed: Feed, *, size: int
) -> Any:
    """Returns a jitted function (variables, feed) -> Sums.

    Args:
      recipe, topology, feed, size: see `make_train_program`.
    """
    step = functools.partial(test_step, recipe, topology.axes)

    def program(variables: Any, feed: Feed) -> Sums:
        source, batch = _batches(feed, size)
        if size == 1:
            return step(variables, source, batch)
        _, sums = jax.lax.scan(
            lambda _, each: (None, step(variables, source, each)), None, batch
        )
        return _total(sums)

    specs = P(), _specs(feed, topology)
    return jax.jit(
        topology.shard_map(program, specs), out_shardings=topology.replicated
    )


def _batches(feed: Feed, size: int) -> tuple[jax.Array | None, Batch]:
    """Returns all images or None, and the batches of a dispatch.

    A single batch has no leading axis.
    """
    source, batch, first = feed
    if source is None:
        return None, batch
    index, where = (
        None
        if rows is None
        else jax.lax.dynamic_slice_in_dim(rows, first, size).reshape(
            (size, -1) if size > 1 else -1
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
