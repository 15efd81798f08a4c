"""Image data sets as uint8 arrays in memory.

CIFAR is read, and prepared if necessary, by tensorflow-datasets (TFDS). Its own
archive extraction and CIFAR reader are replaced: they would import TensorFlow.
Decoded pixels are cached next to its files; see `train.pixel_cache`.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from train import UserError, cifar

NAMES = ("digits", "cifar10", "cifar100")


class Split(NamedTuple):
    """Examples as arrays, or as lazy arrays that are read on access."""

    images: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray  # (N,) int32


class Dataset(NamedTuple):
    train: Split
    test: Split
    num_classes: int


class _Source(NamedTuple):
    splits: dict  # split name -> tfds.core.SplitInfo
    # (split name, indices) -> examples
    read: Callable[[str, Sequence[int]], Split]
    num_classes: int
    image_shape: tuple[int, ...]


def load_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    lazy: bool = False,
    download: bool = True,
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
      lazy: Reads each example on first access and keeps it, for processes that
        each need only a part. Uses cached pixels but does not write them.
      download: False never writes, neither data nor cached pixels: CIFAR must
        have been prepared before.

    Raises:
      UserError: name, data_dir or a split does not exist, a split is empty, or
        CIFAR is not prepared and cannot be.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Choose one of these."
        known = ", ".join(NAMES)
        raise UserError(f"Unknown data set {name!r}; known: {known}. {hint}")
    if data_dir is not None and not os.path.isdir(os.path.expanduser(data_dir)):
        raise UserError(
            f"The data directory {data_dir!r} does not exist. "
            "Create it, or point data_dir at one that does."
        )
    if name == "digits":
        source = _digits()
    else:
        builder = cifar.load_builder(name, data_dir, download=download)
        source = _cifar(builder, write_cache=download and not lazy)
    train, test = (
        _select(source, expression, lazy)
        for expression in (train_split, test_split)
    )
    return Dataset(train, test, source.num_classes)


def order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(num_examples), a function of (seed, epoch) only."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def _select(source: _Source, expression: str, lazy: bool) -> Split:
    """Selects the examples of a TFDS split expression, in order."""
    import tensorflow_datasets as tfds

    parts = []
    # TFDS raises various errors for malformed or unknown expressions.
    with contextlib.suppress(Exception):
        instruction = tfds.core.ReadInstruction.from_spec(expression)
        for part in instruction.to_absolute(source.splits):
            indices = range(source.splits[part.splitname].num_examples)
            parts.append((part.splitname, indices[part.from_ : part.to]))
    if not any(indices for _, indices in parts):
        sizes = (f"{n} ({s.num_examples})" for n, s in source.splits.items())
        raise UserError(
            f"Split {expression!r} selects nothing of {' or '.join(sizes)}. "
            "Write it like train, train[:1000], train[90%:] or test."
        )
    if lazy:
        return _LazySplit(source, parts).split
    arrays = zip(*(source.read(*part) for part in parts))
    return Split(*map(np.concatenate, arrays))


class _LazySplit:
    """Examples that are read on first access and cached."""

    def __init__(self, source: _Source, parts: list[tuple[str, range]]):
        self._source = source
        self._indices = [(name, p) for name, indices in parts for p in indices]
        n = len(self._indices)
        # Memory is only allocated by the system when written.
        self._cache = Split(
            np.empty((n, *source.image_shape), np.uint8), np.empty(n, np.int32)
        )
        self._cached = np.zeros(n, bool)
        self.split = Split(*(_LazyArray(self, i) for i in range(2)))

    def rows(self, index: np.ndarray, column: int) -> np.ndarray:
        wanted = np.unique(index[~self._cached[index]])
        names = np.array([self._indices[i][0] for i in wanted])
        for name in np.unique(names):
            part = wanted[names == name]
            read = self._source.read(name, [self._indices[i][1] for i in part])
            for kept, values in zip(self._cache, read):
                kept[part] = values
        self._cached[wanted] = True
        return self._cache[column][index]

    def array(self, column: int) -> np.ndarray:
        return self._cache[column]


class _LazyArray:
    """A lazy array of examples; supports indexing by arrays and slices."""

    def __init__(self, examples: _LazySplit, column: int):
        self._examples, self._column = examples, column
        self.shape = examples.array(column).shape
        self.dtype = examples.array(column).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        indices = np.arange(len(self))[index]
        return self._examples.rows(indices, self._column)


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

    def read(name: str, indices: Sequence[int]) -> Split:
        return Split(*(x[np.asarray(indices)] for x in data[name]))

    return _Source(splits, read, 10, images.shape[1:])


def _cifar(builder: Any, *, write_cache: bool) -> _Source:
    features = builder.info.features
    shape = features["image"].shape
    splits = dict(builder.info.splits)
    whole: dict[str, Split | None] = {}  # None: not cached

    def decode(split: str, indices: Sequence[int]) -> Split:
        return Split(*cifar.decode(builder, split, indices))

    def read_whole(split: str, wanted: int) -> Split | None:
        """Returns the whole split if cached, or if worth caching."""
        examples = splits[split].num_examples
        cache = cifar.pixel_cache(builder, split, (examples, *shape))
        found = cache.read()
        if found is not None:
            return Split(*found)
        # Of a small part, decoding the rest would take longer than it saves.
        if not write_cache or 2 * wanted < examples or not cache.writable():
            return None
        try:
            key = cache.key()
        except OSError:
            return None  # decoding reports it
        decoded = decode(split, range(examples))
        cache.write(key, *decoded)
        return decoded

    def read(split: str, indices: Sequence[int]) -> Split:
        if split not in whole:
            whole[split] = read_whole(split, len(indices))
        if whole[split] is None:
            return decode(split, indices)
        rows = indices
        if isinstance(indices, range):  # a slice needs no copy
            rows = slice(indices.start, indices.stop, indices.step)
        images, labels = (x[rows] for x in whole[split])
        return Split(images, labels.astype(np.int32))

    return _Source(splits, read, features["label"].num_classes, shape)
