"""CIFAR-10 and -100 on disk, prepared by TFDS without TensorFlow.

TFDS's own archive extraction and CIFAR reader would import TensorFlow.
"""

import contextlib
import http.client
import os
import pathlib
import ssl
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from train import UserError, clock
from train.pixel_cache import PixelCache

_CHUNK = 1000  # examples decoded at a time


def load_builder(name: str, data_dir: str | None, *, download: bool = True):
    """Returns a TFDS builder whose array_record files are on disk.

    Raises:
      UserError: the files are damaged, or do not exist and cannot be prepared;
        or do not exist and download is False.
    """
    from tensorflow_datasets.image_classification import cifar

    base = {"cifar10": cifar.Cifar10, "cifar100": cifar.Cifar100}[name]

    class Builder(_FromTar, base, skip_registration=True):
        name = base.name

    # TFDS reads the variable only once, at import.
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")
    root = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser()
    builder = _read(Builder, root)
    if not builder.data_path.exists():
        if not download:
            raise UserError(
                f"{name} is not prepared in {root}, the data_dir of the run. "
                "Set --data_dir to prepared data, or to a directory to prepare "
                "it in."
            )
        _prepare(Builder(data_dir=root, file_format="array_record"), root)
        builder = _read(Builder, root)  # as it is on disk
    formats = builder.info.available_file_formats()
    if "array_record" not in (format.value for format in formats):
        raise UserError(
            f"{builder.data_dir} has no array_record files. "
            f"Remove it, or point data_dir elsewhere, to have {name} prepared."
        )
    return builder


def decode(
    builder: Any, split: str, indices: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, H, W, C) uint8 and labels (N,) int32.

    Raises:
      UserError: the files are damaged.
    """
    shape = builder.info.features["image"].shape
    images = np.empty((len(indices), *shape), np.uint8)
    labels = np.empty(len(indices), np.int32)
    try:
        rows = builder.as_data_source(split, file_format="array_record")
        for start in range(0, len(indices), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            decoded = rows.__getitems__(list(indices[chunk]))
            images[chunk] = [row["image"] for row in decoded]
            labels[chunk] = [row["label"] for row in decoded]
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(
            f"{builder.data_dir} is damaged: {one_line(error)}. "
            "Remove it, or point data_dir at an intact copy."
        ) from error
    return images, labels


def pixel_cache(builder: Any, split: str, shape: tuple[int, ...]) -> PixelCache:
    """Returns where the decoded pixels of a split are cached."""
    folder = pathlib.Path(builder.data_dir)
    stem = f"{builder.name}-{split}"
    sources = [folder / "dataset_info.json", folder / "features.json"]
    sources += sorted(folder.glob(f"{stem}.array_record*"))
    return PixelCache(folder / f"{stem}.pixels", sources, shape)


def _read(make, root: pathlib.Path):
    """Returns the builder after reading the metadata on disk."""
    try:
        builder = make(data_dir=root)
        features = builder.info.features
        _ = features["image"].shape, features["label"].num_classes
        _ = dict(builder.info.splits)
        return builder
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(
            f"{root / make.name} is damaged: {one_line(error)}. Remove it, or "
            "point data_dir at an intact copy."
        ) from error


class _FromTar:
    """Mixin that makes TFDS's CIFAR builders work without TensorFlow.

    Keys, features and files, including their order, are unchanged.
    """

    def _split_generators(self, dl_manager):
        layout = self._cifar_info
        files = {}
        with tarfile.open(dl_manager.download(layout.url)) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                file = member.name.removeprefix(layout.prefix)
                files[file] = tar.extractfile(member).read()
        for key, file in zip(layout.label_keys, layout.label_files):
            self.info.features[key].names = files[file].decode().split()
        parts = {"train": layout.train_files, "test": layout.test_files}
        return {
            split: self._generate_examples(split, b"".join(map(files.get, of)))
            for split, of in parts.items()
        }

    def _generate_examples(self, split, content):
        import PIL.Image  # TFDS would encode an array with TensorFlow.

        keys = self._cifar_info.label_keys
        rows = np.frombuffer(content, np.uint8).reshape(-1, len(keys) + 3072)
        pixels = rows[:, len(keys) :].reshape(-1, 3, 32, 32)
        for i, array in enumerate(pixels.transpose(0, 2, 3, 1)):
            image = PIL.Image.fromarray(array)
            labels = dict(zip(keys, rows[i]))
            yield i, {"id": f"{split}_{i:05d}", "image": image, **labels}


def _prepare(builder, root: pathlib.Path) -> None:
    """Writes the array_record files, downloading the archive if necessary."""
    import tensorflow_datasets as tfds

    name, url = builder.name, builder._cifar_info.url
    downloads, archive = root / "downloads", url.rsplit("/", 1)[1]
    manual = downloads / "manual" / archive
    cached = (
        f"*{archive.removesuffix('.tar.gz')}*.INFO"  # metadata of a download
    )
    patterns = f"manual/{archive}", cached, f"{name}/{cached}"
    if not any(any(downloads.glob(pattern)) for pattern in patterns):
        # Offline, TFDS would retry for minutes.
        reason = _unreachable(url)
        if reason:
            raise UserError(
                f"{name} is not prepared in {root}, and {url} is unreachable "
                f"({reason}). Point data_dir or TFDS_DATA_DIR at prepared "
                f"data, or put the archive at {manual}; "
                "`python -m train` needs no download."
            )
    try:
        clock.end_line()  # TFDS draws its own progress bars
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except tfds.download.download_manager.NonMatchingChecksumError as error:
        culprit = manual if manual.exists() else url
        raise UserError(
            f"{culprit} has a wrong checksum: it is not {name}, or damaged. "
            f"Replace it with the file from {url}."
        ) from error
    except (OSError, tfds.download.DownloadError) as error:
        if builder.data_path.exists():  # prepared by another process meanwhile
            return
        raise UserError(
            f"{name} cannot be prepared in {root}: {one_line(error)}. "
            "Fix this, or point data_dir or TFDS_DATA_DIR elsewhere."
        ) from error


def _unreachable(url: str, *, seconds: float = 5.0) -> str | None:
    """Returns why url cannot be reached, or None."""
    reason = f"no answer in {seconds:g} s"

    def probe() -> None:
        nonlocal reason
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
            reason = None
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            # TFDS uses its own certificates: let it try.
            distrust = isinstance(cause, ssl.SSLCertVerificationError)
            reason = None if distrust else one_line(cause)

    # A thread, since the timeout does not cover DNS resolution.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return reason


def one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
