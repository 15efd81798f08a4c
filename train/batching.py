"""Batches of examples, for training and testing."""

from __future__ import annotations

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
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields full batches in the order of `order`, dropping the remainder.

    Args:
      split: the examples.
      batch_size: global batch size, over all processes.
      seed, epoch: determine the order.
      start: number of batches to skip without reading them.
      rows: indices within each batch to read; None reads all.

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
    indices = indices[start * batch_size : full]
    return _batches(split, indices, batch_size, rows)


def stack_batches(
    batches: Iterable[Batch], count: int
) -> Iterator[tuple[int, Batch]]:
    """Yields (count, count batches stacked on a new first axis).

    The remaining batches are yielded one by one, without the axis.
    """
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == count:
            yield count, waiting[0] if count == 1 else _stack(waiting)
            waiting = []
    for batch in waiting:
        yield 1, batch


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
