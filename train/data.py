"""Image data sets as uint8 arrays in memory, and batches of them.

CIFAR is read, and if need be prepared, by tensorflow-datasets (TFDS) without
TensorFlow, which its own archive extraction and CIFAR reader would import.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from train import UserError, cifar

NAMES = ("digits", "cifar10", "cifar100")

_CHUNK = 1000  # examples decoded at a time


class Split(NamedTuple):
    images: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray  # (N,) int32


class Dataset(NamedTuple):
    train: Split
    test: Split
    num_classes: int


class Batch(NamedTuple):
    images: np.ndarray  # (B, H, W, C) uint8
    labels: np.ndarray  # (B,) int32
    index: np.ndarray  # (B,) int32, the example's place in its Split
    where: np.ndarray  # (B,) bool, False for padding


class _Source(NamedTuple):
    splits: dict  # split name -> tfds.core.SplitInfo
    read: Callable[[str, range], Split]  # (split name, places) -> examples
    num_classes: int


def load(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
) -> Dataset:
    """Reads a data set into memory, preparing CIFAR first if necessary.

    Args:
      name: One of `NAMES`. digits needs no download; of its 1797 examples,
        stably sorted by class, every fifth is in test: 1437 train, 360 test.
      data_dir: Where TFDS keeps its data; None means $TFDS_DATA_DIR, else
        ~/tensorflow_datasets. An archive in data_dir/downloads/manual is used
        in place of a download.
      train_split, test_split: TFDS split expressions. A validation set is
        train_split="train[:45000]", test_split="train[45000:]".

    Raises:
      UserError: name, data_dir or a split does not exist, a split is empty, or
        CIFAR is neither prepared nor can be.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Choose one of these."
        known = ", ".join(NAMES)
        raise UserError(f"Unknown data set {name!r}; known: {known}.\n{hint}")
    if data_dir is not None and not os.path.isdir(os.path.expanduser(data_dir)):
        raise UserError(
            f"The data directory {data_dir!r} does not exist.\n"
            "Create it, or point data_dir at one that does."
        )
    source = _digits() if name == "digits" else _cifar(name, data_dir)
    train = _select(source, train_split)
    return Dataset(train, _select(source, test_split), source.num_classes)


def order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(num_examples): a function of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def train_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int
) -> Iterator[Batch]:
    """Full batches in `order`; the rest of the epoch is left out.

    Raises:
      UserError: batch_size is not in 1..N.
    """
    num_examples = len(split.labels)
    if not 1 <= batch_size <= num_examples:
        raise UserError(
            f"Batch size {batch_size} does not fit {num_examples} training "
            f"examples.\nChoose one from 1 to {num_examples}."
        )
    places = order(num_examples, seed=seed, epoch=epoch)
    full = num_examples - num_examples % batch_size
    return _batches(split, places[:full], batch_size)


def test_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """Every example once, in place; zeros fill the last batch.

    Raises:
      UserError: batch_size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"Batch size {batch_size} is not positive.")
    return _batches(split, np.arange(len(split.labels)), batch_size)


test_batches.__test__ = False  # for pytest, where it is imported by name


def _batches(split: Split, places: np.ndarray, size: int) -> Iterator[Batch]:
    for start in range(0, len(places), size):
        index = places[start : start + size].astype(np.int32)
        where = np.ones(len(index), bool)
        batch = split.images[index], split.labels[index], index, where
        padding = (0, size - len(index))
        yield Batch(
            *(np.pad(x, [padding] + [(0, 0)] * (x.ndim - 1)) for x in batch)
        )


def _select(source: _Source, expression: str) -> Split:
    """Reads the examples of a TFDS split expression, in its order."""
    import tensorflow_datasets as tfds

    parts = []
    # TFDS's errors for what is malformed, unknown or out of range.
    with contextlib.suppress(ValueError, NotImplementedError):
        instruction = tfds.core.ReadInstruction.from_spec(expression)
        for part in instruction.to_absolute(source.splits):
            places = range(source.splits[part.splitname].num_examples)
            parts.append((part.splitname, places[part.from_ : part.to]))
    if not any(places for _, places in parts):
        sizes = (f"{n} ({s.num_examples})" for n, s in source.splits.items())
        raise UserError(
            f"Split {expression!r} selects nothing of {' or '.join(sizes)}.\n"
            "Write it like train, train[:1000], train[90%:] or test."
        )
    arrays = zip(*(source.read(*part) for part in parts))
    return Split(*map(np.concatenate, arrays))


def _digits() -> _Source:
    import sklearn.datasets
    import tensorflow_datasets as tfds

    bunch = sklearn.datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    in_test = np.zeros(len(labels), bool)
    in_test[np.argsort(labels, kind="stable")[::5]] = True
    data = {
        name: Split(images[keep], labels[keep])
        for name, keep in (("train", ~in_test), ("test", in_test))
    }
    splits = {
        name: tfds.core.SplitInfo(name, [len(split.labels)], num_bytes=0)
        for name, split in data.items()
    }

    def read(name: str, places: range) -> Split:
        return Split(*(x[places.start : places.stop] for x in data[name]))

    return _Source(splits, read, num_classes=10)


def _cifar(name: str, data_dir: str | None) -> _Source:
    builder = cifar.prepared(name, data_dir)
    features = builder.info.features

    def read(split: str, places: range) -> Split:
        images = np.empty((len(places), *features["image"].shape), np.uint8)
        labels = np.empty(len(places), np.int32)
        try:
            rows = builder.as_data_source(split, file_format="array_record")
            for start in range(0, len(places), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                decoded = rows.__getitems__(list(places[chunk]))
                images[chunk] = [row["image"] for row in decoded]
                labels[chunk] = [row["label"] for row in decoded]
        except RuntimeError as error:
            raise UserError(
                f"{builder.data_dir} is damaged: {cifar.one_line(error)}.\n"
                "Remove it, or point data_dir at an intact copy."
            ) from error
        return Split(images, labels)

    splits = dict(builder.info.splits)
    return _Source(splits, read, features["label"].num_classes)
