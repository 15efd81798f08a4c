"""Input pipelines: what each dispatch of a program reads.

`HostPipeline` copies batches to the devices while earlier ones are processed.
`DevicePipeline` keeps all images on every device, so that a dispatch may
process a whole epoch without the host. Both process the same examples.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from train.batching import (
    Batch,
    batch_indices,
    dispatch_sizes,
    stack_batches,
    test_batches,
    train_batches,
)
from train.data import Dataset, Split
from train.prefetch import prefetch
from train.timing import Timer
from train.topology import Topology


class Feed(NamedTuple):
    """Input of one dispatch.

    Fields of batch are (B, ...), or (batches, B, ...). With a source, it has no
    images and labels, and holds all batches of the epoch, of which the program
    takes some, beginning at `first`.
    """

    source: Any  # Split on every device, or None
    batch: Any  # Batch, sharded over the devices
    first: Any  # () int32, number of a batch


class Pipeline(abc.ABC):
    """What the training loop reads from.

    Args:
      config: reads batch sizes and steps_per_dispatch.
      dataset: what to read.
      topology: devices of a batch.
    """

    on_device: bool  # whether the devices hold all images

    def __init__(
        self, config: ConfigDict, dataset: Dataset, topology: Topology
    ):
        self._dataset, self._topology = dataset, topology
        self._size = config.batch_size
        # The last batch is padded anyway; round up to the devices.
        examples = len(dataset.test.labels)
        self._test_size = topology.padded(min(config.test_batch_size, examples))
        self._per_dispatch = config.steps_per_dispatch

    @abc.abstractmethod
    def train_feeds(
        self, *, seed: int, epoch: int, start: int, stop: int, timer: Timer
    ) -> Iterator[tuple[int, Feed]]:
        """Yields (number of batches, their Feed) for batches start..stop."""

    @abc.abstractmethod
    def test_feeds(self) -> Iterator[tuple[int, Feed]]:
        """Yields (number of batches, their Feed) for the test split."""

    @abc.abstractmethod
    def train_sizes(self, batches: int) -> list[int]:
        """Returns the number of batches of each dispatch."""

    @abc.abstractmethod
    def test_sizes(self) -> list[int]:
        """Returns the number of batches of each dispatch of the test split."""

    @abc.abstractmethod
    def abstract_feed(self, num_batches: int, *, train: bool) -> Feed:
        """Returns shapes, dtypes and shardings of a Feed."""


class HostPipeline(Pipeline):
    """Reads batches on the host, and copies them to the devices in time."""

    on_device = False

    def train_feeds(
        self, *, seed: int, epoch: int, start: int, stop: int, timer: Timer
    ) -> Iterator[tuple[int, Feed]]:
        batches = train_batches(
            self._dataset.train,
            self._size,
            seed=seed,
            epoch=epoch,
            start=start,
            stop=stop,
            rows=self._topology.rows(self._size),
        )
        together = stack_batches(batches, self.train_sizes(stop - start))
        for count, rows in prefetch(together, timer):
            with timer.measure("steps"):
                batch = self._topology.put(rows, self._size, stacked=count > 1)
            yield count, Feed(None, batch, np.int32(0))

    def test_feeds(self) -> Iterator[tuple[int, Feed]]:
        size = self._test_size
        for rows in test_batches(
            self._dataset.test, size, rows=self._topology.rows(size)
        ):
            yield 1, Feed(None, self._topology.put(rows, size), np.int32(0))

    def train_sizes(self, batches: int) -> list[int]:
        return dispatch_sizes(batches, self._per_dispatch)

    def test_sizes(self) -> list[int]:
        batches = -(-len(self._dataset.test.labels) // self._test_size)
        return [1] * batches

    def abstract_feed(self, num_batches: int, *, train: bool) -> Feed:
        rows = self._size if train else self._test_size
        shape = self._dataset.train.images.shape[1:]
        lead = () if num_batches == 1 else (num_batches,)
        batch = abstract_batch(self._topology, (*lead, rows), shape)
        return Feed(None, batch, np.int32(0))


class DevicePipeline(Pipeline):
    """Keeps all images and labels on every device."""

    on_device = True

    def __init__(
        self, config: ConfigDict, dataset: Dataset, topology: Topology
    ):
        super().__init__(config, dataset, topology)
        self._steps = len(dataset.train.labels) // config.batch_size
        if not self._per_dispatch and jax.default_backend() == "cpu":
            # XLA runs convolutions inside loops many times slower on CPUs.
            self._per_dispatch = 1
        train, test = (
            Split(split.images[:], split.labels[:])
            for split in (dataset.train, dataset.test)
        )
        self._train, self._test = topology.replicate((train, test))
        self._test_batch = self._put(
            *_stacked_test(len(test.labels), self._test_size), self._test_size
        )

    def train_feeds(
        self, *, seed: int, epoch: int, start: int, stop: int, timer: Timer
    ) -> Iterator[tuple[int, Feed]]:
        with timer.measure("data"):
            index = batch_indices(
                self._dataset.train, self._size, seed=seed, epoch=epoch
            )
            batch = self._put(index, None, self._size)
        for count in self.train_sizes(stop - start):
            yield count, Feed(self._train, batch, np.int32(start))
            start += count

    def test_feeds(self) -> Iterator[tuple[int, Feed]]:
        first = 0
        for count in self.test_sizes():
            yield count, Feed(self._test, self._test_batch, np.int32(first))
            first += count

    def train_sizes(self, batches: int) -> list[int]:
        return dispatch_sizes(batches, self._per_dispatch or max(batches, 1))

    def test_sizes(self) -> list[int]:
        return self.train_sizes(len(self._test_batch.index))

    def abstract_feed(self, num_batches: int, *, train: bool) -> Feed:
        del num_batches  # all batches of the epoch are there
        if not train:
            return Feed(self._test, self._test_batch, np.int32(0))
        batch = abstract_batch(self._topology, (self._steps, self._size), ())
        batch = Batch(None, None, batch.index, None)
        return Feed(self._train, batch, np.int32(0))

    def _put(self, index: np.ndarray, where: Any, size: int) -> Batch:
        own = self._topology.rows(size)
        rows = Batch(
            None, None, index[:, own], None if where is None else where[:, own]
        )
        return self._topology.put(rows, size, stacked=True)


def make_pipeline(
    config: ConfigDict, dataset: Dataset, topology: Topology
) -> Pipeline:
    """Returns the input pipeline of a config."""
    kind = DevicePipeline if config.data_on_device else HostPipeline
    return kind(config, dataset, topology)


def abstract_batch(
    topology: Topology, size: tuple[int, ...], image_shape: tuple[int, ...]
) -> Batch:
    """Returns shapes, dtypes and shardings of a global batch.

    Args:
      topology: devices of the batch.
      size: (B,), or (batches, B).
      image_shape: (H, W, C).
    """
    spec = P(*(None,) * (len(size) - 1), topology.axes)
    sharding = NamedSharding(topology.mesh, spec)

    def rows(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*size, *dims), dtype, sharding=sharding)

    return Batch(
        images=rows(np.uint8, *image_shape),
        labels=rows(np.int32),
        index=rows(np.int32),
        where=rows(np.bool_),
    )


def _stacked_test(examples: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and mask of all test batches, (batches, size) each."""
    position = np.arange(-(-examples // size) * size, dtype=np.int32)
    index = np.minimum(position, examples - 1)
    shape = (-1, size)
    return index.reshape(shape), (position < examples).reshape(shape)
