"""Batches of examples, for training and testing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from train import UserError
from train.data import Split, order


class Batch(NamedTuple):
    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B,) int32
    index: np.ndarray  # (B,) int32, index into the Split
    where: np.ndarray  # (B,) bool, False for padding


def train_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    stop: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields full batches in the order of `order`, dropping the remainder.

    Args:
      split: the examples.
      batch_size: global batch size, over all processes.
      seed, epoch: determine the order.
      start: number of batches to skip without reading them.
      stop: number of the batch to stop before; None reads all full batches.
      rows: indices within each batch to read; None reads all.

    Raises:
      UserError: batch_size is not in 1..N.
    """
    indices = batch_indices(split, batch_size, seed=seed, epoch=epoch)
    return _batches(split, indices[start:stop].ravel(), batch_size, rows)


def batch_indices(
    split: Split, batch_size: int, *, seed: int, epoch: int
) -> np.ndarray:
    """Returns the examples of all full batches of an epoch, (S, B) int32.

    Raises:
      UserError: batch_size is not in 1..N.
    """
    num_examples = len(split.labels)
    if not 1 <= batch_size <= num_examples:
        raise UserError(
            f"Batch size {batch_size} must be from 1 to {num_examples}, the "
            "number of training examples."
        )
    indices = order(num_examples, seed=seed, epoch=epoch)
    full = num_examples - num_examples % batch_size
    return indices[:full].reshape(-1, batch_size).astype(np.int32)


def dispatch_sizes(batches: int, per_dispatch: int) -> list[int]:
    """Splits a number of batches into dispatches; the last may be smaller."""
    whole, rest = divmod(batches, per_dispatch)
    return [per_dispatch] * whole + [rest] * (rest > 0)


def stack_batches(
    batches: Iterable[Batch], sizes: Iterable[int]
) -> Iterator[tuple[int, Batch]]:
    """Yields (size, size batches stacked on a new first axis).

    A single batch has no such axis.
    """
    batches = iter(batches)
    for size in sizes:
        together = list(itertools.islice(batches, size))
        yield size, together[0] if size == 1 else _stack(together)


def _stack(batches: Sequence[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*batches)))


def test_batches(
    split: Split, batch_size: int, *, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields every example once, in order; the last batch is zero-padded.

    Args:
      split: the examples.
      batch_size: global batch size, over all processes.
      rows: indices within each batch to read; None reads all.

    Raises:
      UserError: batch_size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"Batch size {batch_size} is not positive.")
    return _batches(split, np.arange(len(split.labels)), batch_size, rows)


test_batches.__test__ = False  # for pytest, where it is imported by name


def _batches(
    split: Split, indices: np.ndarray, size: int, rows: np.ndarray | None
) -> Iterator[Batch]:
    rows = np.arange(size) if rows is None else rows
    for start in range(0, len(indices), size):
        batch = indices[start : start + size].astype(np.int32)
        index = batch[rows[rows < len(batch)]]
        where = np.ones(len(index), bool)
        values = split.images[index], split.labels[index], index, where
        padding = (0, len(rows) - len(index))
        yield Batch(
            *(np.pad(x, [padding] + [(0, 0)] * (x.ndim - 1)) for x in values)
        )
