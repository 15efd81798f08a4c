"""CIFAR, prepared from small archives made here, online and offline."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource

from tests.helpers.cifar_archives import (
    FINE,
    URL,
    accept,
    go_offline,
    write_archive,
)
from train import UserError, cifar, data


@pytest.fixture(scope="module", params=[10, 100], ids=["cifar10", "cifar100"])
def prepared(request, tmp_path_factory):
    """(name, data_dir, raw rows, Dataset) of a data set prepared offline."""
    num_classes = request.param
    name = f"cifar{num_classes}"
    root = tmp_path_factory.mktemp(name)
    archive = root / f"downloads/manual/cifar-{num_classes}-binary.tar.gz"
    rows = write_archive(archive, num_classes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        accept(monkeypatch, archive, num_classes)
        go_offline(monkeypatch)
        dataset = data.load_dataset(name, data_dir=str(root))
    archive.unlink()
    return name, root, rows, dataset


def fails(*args, **kwargs) -> str:
    """Returns the message of the UserError that `load` raises."""
    with pytest.raises(UserError) as caught:
        data.load_dataset(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


# CIFAR, from archives made here


def test_prepared_equals_the_archive(prepared):
    name, root, rows, dataset = prepared
    assert dataset.num_classes == int(name.removeprefix("cifar"))
    info = tfds.builder_from_directory(root / name / "3.0.2")
    assert info.info.features["label"].names == FINE[: dataset.num_classes]
    for split, got in zip(("train", "test"), dataset):
        # TFDS shuffles by key; the id tells an example's place in the archive.
        examples = list(info.as_data_source(split))
        ids = [example["id"].decode() for example in examples]
        assert sorted(ids) == [f"{split}_{i:05d}" for i in range(len(ids))]
        assert ids != sorted(ids)
        places = [int(id_.removeprefix(f"{split}_")) for id_ in ids]
        raw = rows[split][places]
        pixels = raw[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(got.images, pixels)
        np.testing.assert_array_equal(got.labels, raw[:, -3073])
        assert got.images.dtype == np.uint8 and got.labels.dtype == np.int32
        if name == "cifar100":
            coarse = [example["coarse_label"] for example in examples]
            np.testing.assert_array_equal(coarse, raw[:, 0])


def test_prepared_is_found_through_the_environment(prepared, monkeypatch):
    name, root, _, dataset = prepared
    go_offline(monkeypatch)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    got = data.load_dataset(
        name, train_split="train[:30]", test_split="train[30:]"
    )
    np.testing.assert_array_equal(got.train.images, dataset.train.images[:30])
    np.testing.assert_array_equal(got.test.images, dataset.train.images[30:])
    np.testing.assert_array_equal(got.test.labels, dataset.train.labels[30:])
    message = fails(name, train_split="train[:41]")
    assert "train (40) or test (10)" in message


def test_reading_writes_nothing(prepared):
    name, root, _, _ = prepared

    def state():
        return {p: p.stat().st_mtime_ns for p in [root, *root.rglob("*")]}

    before = state()
    data.load_dataset(name, data_dir=str(root))
    assert state() == before
    assert not any("incomplete" in path.name for path in before)


def test_earlier_download_is_used_offline(tmp_path, monkeypatch):
    archive = tmp_path / "archive"
    write_archive(archive, 10)
    checksum = accept(monkeypatch, archive, 10)
    fname = resource.get_dl_fname(URL.format(10), checksum)
    cached = tmp_path / "downloads/cifar10" / fname
    cached.parent.mkdir(parents=True)
    archive.rename(cached)
    resource.get_info_path(cached).write_text("{}")
    go_offline(monkeypatch)
    assert (
        len(data.load_dataset("cifar10", data_dir=str(tmp_path)).train.labels)
        == 40
    )


def test_wrong_archive_can_be_replaced(tmp_path, monkeypatch):
    go_offline(monkeypatch)
    archive = tmp_path / "downloads/manual/cifar-10-binary.tar.gz"
    write_archive(archive, 10)  # not the checksum that TFDS knows
    message = fails("cifar10", data_dir=str(tmp_path))
    assert f"{archive} has a wrong checksum" in message
    assert URL.format(10) in message
    assert not list(tmp_path.glob("cifar10/*"))
    accept(monkeypatch, archive, 10)
    assert (
        len(data.load_dataset("cifar10", data_dir=str(tmp_path)).test.labels)
        == 10
    )


def copy_of(prepared, tmp_path) -> tuple[str, pathlib.Path]:
    name, root, _, _ = prepared
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return name, tmp_path / name / "3.0.2"


def test_other_file_format(prepared, tmp_path):
    name, folder = copy_of(prepared, tmp_path)
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    message = fails(name, data_dir=str(tmp_path))
    assert f"{folder} has no array_record files" in message


def test_missing_file(prepared, tmp_path):
    name, folder = copy_of(prepared, tmp_path)
    next(folder.glob("*train.array_record*")).unlink()
    message = fails(name, data_dir=str(tmp_path))
    assert f"{folder} is damaged" in message


def test_place_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(blocked / "sub"))
    monkeypatch.setattr(cifar, "_unreachable", lambda url: None)
    message = fails("cifar10")
    assert f"cifar10 cannot be prepared in {blocked / 'sub'}" in message


# Without a connection


@pytest.mark.parametrize("by_argument", [True, False])
def test_offline_and_not_prepared(tmp_path, monkeypatch, by_argument):
    go_offline(monkeypatch)
    if not by_argument:
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    start = time.monotonic()
    message = fails("cifar100", data_dir=str(tmp_path) if by_argument else None)
    assert time.monotonic() - start < 5
    assert f"cifar100 is not prepared in {tmp_path}" in message
    assert "network is unreachable" in message
    manual = tmp_path / "downloads/manual/cifar-100-binary.tar.gz"
    assert str(manual) in message
    assert "`python -m train` needs no download" in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_silent_host_counts_as_unreachable(monkeypatch):
    def stall(*args, **kwargs):
        time.sleep(2)
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", stall)
    start = time.monotonic()
    reason = cifar._unreachable(URL.format(10), seconds=0.1)
    assert reason == "no answer in 0.1 s"
    assert time.monotonic() - start < 1


# Without TensorFlow


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None,
    reason="TFDS imports TensorFlow where it is installed",
)
def test_needs_neither_tensorflow_nor_jax(prepared):
    name, root, _, _ = prepared
    script = f"""
import sys
from train import data
assert "tensorflow_datasets" not in sys.modules  # slow, hence imported late
assert "sklearn" not in sys.modules
data.load_dataset("digits")
data.load_dataset({name!r}, data_dir={str(root)!r})
assert not {{"tensorflow", "jax"}} & set(sys.modules)
"""
    repository = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=repository, check=True)
