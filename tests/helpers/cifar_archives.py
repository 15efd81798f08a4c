"""Small CIFAR archives of the true layout, and TFDS made to accept them."""

import io
import pathlib
import tarfile
import urllib.error
import urllib.request

import numpy as np
from tensorflow_datasets.core.download import checksums

URL = "https://www.cs.toronto.edu/~kriz/cifar-{}-binary.tar.gz"
FINE = [f"class_{i}" for i in range(100)]
COARSE = [f"group_{i}" for i in range(20)]


def write_archive(path: pathlib.Path, num_classes: int) -> dict:
    """Writes a small archive of the true layout; returns {split: raw rows}."""
    rng = np.random.default_rng(num_classes)
    rows = {
        split: rng.integers(0, 256, (n, num_classes // 100 + 3073), np.uint8)
        for split, n in (("train", 40), ("test", 10))
    }
    for array in rows.values():
        array[:, 0] %= 10 if num_classes == 10 else 20
        if num_classes == 100:
            array[:, 1] %= 100
    if num_classes == 10:
        prefix = "cifar-10-batches-bin/"
        files = {"batches.meta.txt": "\n".join(FINE[:10]) + "\n\n"}
        for i, part in enumerate(np.split(rows["train"], 5)):
            files[f"data_batch_{i + 1}.bin"] = part.tobytes()
        files["readme.html"] = "<html>"
        files["test_batch.bin"] = rows["test"].tobytes()
    else:
        prefix = "cifar-100-binary/"
        files = {
            "coarse_label_names.txt": "\n".join(COARSE) + "\n",
            "fine_label_names.txt": "\n".join(FINE) + "\n",
            "test.bin": rows["test"].tobytes(),
            "train.bin": rows["train"].tobytes(),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(prefix.rstrip("/"))
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            if isinstance(content, str):
                content = content.encode()
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return rows


def accept(monkeypatch, path: pathlib.Path, num_classes: int) -> str:
    """Registers the archive at path as the right one; returns its sha256."""
    info = checksums.compute_url_info(path)
    known = checksums.get_all_url_infos()
    monkeypatch.setitem(known, URL.format(num_classes), info)
    return info.checksum


def go_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
