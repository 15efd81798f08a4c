"""The cache of decoded pixels: used where intact, otherwise rebuilt."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest

from tests.helpers.cifar_archives import accept, go_offline, write_archive
from train import UserError, cifar, data
from train.pixel_cache import PixelCache

SHAPE = (5, 4, 4, 3)


def arrays(seed: int = 0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, SHAPE, np.uint8)
    return images, rng.integers(0, 100, SHAPE[0]).astype(np.int32)


@pytest.fixture
def cache(tmp_path):
    """A written cache of two source files."""
    sources = [tmp_path / "a", tmp_path / "b"]
    for path in sources:
        path.write_bytes(b"source")
    cache = PixelCache(tmp_path / "split.pixels", sources, SHAPE)
    assert cache.read() is None
    cache.write(cache.key(), *arrays())
    return cache


def assert_reads(cache, want):
    for got, expected in zip(cache.read(), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_reads_what_was_written(cache):
    assert_reads(cache, arrays())
    images, labels = cache.read()
    assert images.dtype == labels.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def flip_bit(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def header_of(content: bytes, **fields) -> bytes:
    line, _, rest = content.partition(b"\n")
    return json.dumps(json.loads(line) | fields).encode() + b"\n" + rest


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-1],
    "cut in the header": lambda content: content[:20],
    "longer": lambda content: content + b"\0",
    "bit of a pixel": lambda content: flip_bit(content, -1),
    "bit of a label": lambda content: flip_bit(
        content, content.index(b"\n") + 1
    ),
    "zeros": lambda content: bytes(len(content)),
    "not JSON": lambda content: b"\xff\n" + content,
    "a list": lambda content: b"[]\n" + content.partition(b"\n")[2],
    "a number": lambda content: b"1\n" + content.partition(b"\n")[2],
    "nested": lambda content: b"[" * 100_000 + b"\n",
    "one long line": lambda content: b"1" * (1 << 21),
    "other format": lambda content: header_of(content, format="2"),
    "no checksum": lambda content: header_of(content, checksum=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_not_used(cache, damage):
    intact = cache.path.read_bytes()
    cache.path.write_bytes(DAMAGE[damage](intact))
    assert cache.read() is None
    cache.write(cache.key(), *arrays())
    assert cache.path.read_bytes() == intact


def test_changed_sources_make_it_stale(cache):
    first, second = cache.sources
    for change in (
        lambda: os.utime(second, ns=(0, 1)),
        lambda: second.write_bytes(b"longer source"),
        lambda: second.unlink(),
    ):
        cache.write(cache.key(), *arrays())
        assert_reads(cache, arrays())
        change()
        assert cache.read() is None
    for sources in ([first], [first, first]):
        assert cache._replace(sources=sources).read() is None


def test_other_shape_makes_it_stale(cache):
    assert cache._replace(shape=(5, 3, 4, 4)).read() is None
    assert cache._replace(shape=(4, 4, 4, 3)).read() is None


def test_not_written_if_the_sources_changed_meanwhile(cache):
    key, before = cache.key(), cache.path.read_bytes()
    os.utime(cache.sources[0], ns=(0, 1))
    cache.write(key, *arrays(1))
    assert cache.path.read_bytes() == before


def test_link_is_neither_read_nor_written_through(cache, tmp_path):
    target = tmp_path / "target"
    cache.path.rename(target)
    cache.path.symlink_to(target)
    assert cache.read() is None
    before = target.read_bytes()
    cache.write(cache.key(), *arrays(1))
    assert target.read_bytes() == before
    assert not cache.path.is_symlink()
    assert_reads(cache, arrays(1))


def test_pipe_does_not_block(cache):
    cache.path.unlink()
    os.mkfifo(cache.path)
    assert cache.read() is None


def test_directory_in_its_place(cache, tmp_path):
    cache.path.unlink()
    cache.path.mkdir()
    assert cache.read() is None
    cache.write(cache.key(), *arrays())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a",
        "b",
        "split.pixels",
    ]


def test_failed_write_leaves_the_previous_file(cache, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache.write(cache.key(), *arrays(1))
    assert_reads(cache, arrays())
    assert len(list(tmp_path.iterdir())) == 3


def test_mapped_file_survives_its_replacement(cache):
    images, labels = cache.read()
    cache.write(cache.key(), *arrays(1))
    np.testing.assert_array_equal(images, arrays()[0])
    np.testing.assert_array_equal(labels, arrays()[1])


def test_concurrent_writers_and_readers(cache, tmp_path):
    def write_and_read(_):
        cache.write(cache.key(), *arrays())
        assert_reads(cache, arrays())

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_read, range(40)))
    assert len(list(tmp_path.iterdir())) == 3


# In data.load_dataset, with CIFAR-10 prepared from a small archive


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar10")
    archive = root / "downloads/manual/cifar-10-binary.tar.gz"
    write_archive(archive, 10)
    with pytest.MonkeyPatch.context() as monkeypatch:
        accept(monkeypatch, archive, 10)
        go_offline(monkeypatch)
        dataset = data.load_dataset("cifar10", data_dir=str(root))
    return root, dataset


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared data without caches, and its version folder."""
    root, _ = prepared
    shutil.copytree(root / "cifar10", tmp_path / "cifar10")
    folder = tmp_path / "cifar10/3.0.2"
    for path in caches(folder):
        path.unlink()
    return tmp_path, folder


def caches(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.pixels"))


def load(root: pathlib.Path, **options):
    return data.load_dataset("cifar10", data_dir=str(root), **options)


def assert_same(got, want):
    for split, expected in zip(got[:2], want[:2], strict=True):
        for array, values in zip(split, expected, strict=True):
            np.testing.assert_array_equal(array[:], values)
            assert array.dtype == values.dtype


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded")

    return lambda: monkeypatch.setattr(cifar, "decode", refuse)


def test_second_load_decodes_nothing(prepared, copy, no_decoding):
    root, folder = copy
    assert_same(load(root), prepared[1])
    names = [path.name for path in caches(folder)]
    assert names == ["cifar10-test.pixels", "cifar10-train.pixels"]
    no_decoding()
    got = load(root)
    assert_same(got, prepared[1])
    for split in got[:2]:
        for array in split:  # in memory and writable, as without a cache
            assert type(array) is np.ndarray and array.flags.writeable
    got = load(root, train_split="train[30:]+test[:3]", test_split="train[:2]")
    (images, labels), test = prepared[1][:2]
    want = [*images[30:], *test.images[:3]]
    np.testing.assert_array_equal(got.train.images, want)
    np.testing.assert_array_equal(got.test.labels, labels[:2])


def test_decoding_in_chunks(prepared, monkeypatch):
    root, dataset = prepared
    builder = cifar.load_builder("cifar10", str(root))
    monkeypatch.setattr(cifar, "_CHUNK", 16)
    got = cifar.decode(builder, "train", range(40))
    assert_same([got], [dataset.train])


def test_damaged_cache_is_rebuilt(prepared, copy):
    root, folder = copy
    load(root)
    before = [path.read_bytes() for path in caches(folder)]
    for path, content in zip(caches(folder), before):
        path.write_bytes(flip_bit(content, -1))
    assert_same(load(root), prepared[1])
    assert [path.read_bytes() for path in caches(folder)] == before


def test_damaged_sources_are_reported_in_spite_of_a_cache(copy):
    root, folder = copy
    load(root)
    shard = next(folder.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    os.utime(shard, ns=(0, time.time_ns()))
    with pytest.raises(UserError, match="is damaged"):
        load(root)


@pytest.mark.parametrize("options", [{"download": False}, {"lazy": True}])
def test_reads_but_never_writes(prepared, copy, no_decoding, options):
    root, folder = copy
    assert_same(load(root, **options), prepared[1])
    assert not caches(folder)
    load(root)
    no_decoding()
    assert_same(load(root, **options), prepared[1])


def test_read_only_folder_stays_unchanged(prepared, copy):
    root, folder = copy
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        assert_same(load(root), prepared[1])
        assert sorted(folder.iterdir()) == before
    finally:
        folder.chmod(0o755)


def test_small_part_is_not_cached(copy):
    root, folder = copy
    load(root, train_split="train[:19]", test_split="test[:4]")
    assert not caches(folder)
    load(root, train_split="train[:20]", test_split="test[:4]")
    assert [path.name for path in caches(folder)] == ["cifar10-train.pixels"]
