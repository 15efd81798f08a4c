"""A trained network without its data set: loaded, and exported."""

import errno
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import tiny_network
from tests.helpers.recipes import small_config
from train import (
    UserError,
    data,
    export,
    load,
    loop,
    networks,
    preprocessing,
    trained_run,
)

# What a user writes who has JAX and none of this code.
CLASSIFY = """
import sys
import jax
import numpy as np
from safetensors.numpy import load_file

folder, images = sys.argv[1], np.load(sys.argv[2])
with open(f"{folder}/program.bin", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
logits = program.call(load_file(f"{folder}/weights.safetensors"), images)
np.save(sys.argv[3], logits)
assert "jaxbn" not in sys.modules and "flax" not in sys.modules
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("load") / "run"
    return workdir, loop.train(small_config(epochs=1), workdir)


@pytest.fixture(scope="module")
def images():
    return data.load_dataset("digits", test_split="test[:100]").test


def test_the_network_answers_as_in_the_run(run, images, monkeypatch):
    workdir, summary = run
    monkeypatch.setattr(
        data, "load_dataset", None
    )  # nothing reads the data set
    trained = load.load(workdir)
    found = trained.logits(images.images)
    assert found.shape == (100, 10) and found.dtype == np.float32
    right = np.mean(found.argmax(-1) == images.labels)
    assert right == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert trained.step == 4
    # On one device, however many the run had.
    assert all(
        len(leaf.sharding.device_set) == 1
        for leaf in jax.tree.leaves(trained.variables)
    )


def test_a_mesh_that_is_not_there(tmp_path, monkeypatch):
    """Statistics over an axis of the run's mesh; it is loaded without."""
    monkeypatch.setattr(networks, "make", tiny_network.make)
    changes = {"mesh": "replica=2,data", "norm_axes": "replica"}
    loop.train(small_config(epochs=1, **changes), tmp_path)
    assert load.load(tmp_path).step == 4
    assert trained_run.load_run(tmp_path).state.step == 4


def test_images_of_another_kind(run):
    trained = load.load(run[0])
    with pytest.raises(
        ValueError, match=r"uint8 of shape \(N, 8, 8, 1\); got f"
    ):
        trained.preprocess(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"got uint8\[2, 28, 28, 1\]"):
        trained.preprocess(np.zeros((2, 28, 28, 1), np.uint8))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "which says how images are normalized. Rerun the training"),
        ("{", "preprocessing.json"),
        ('{"image_shape": [8, 8, 1]}', "preprocessing.json is damaged"),
    ],
)
def test_a_damaged_file_is_told(run, tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(
        (run[0] / "config.json").read_bytes()
    )
    if content is not None:
        (tmp_path / preprocessing.FILE).write_text(content)
    with pytest.raises(UserError, match=message):
        load.load(tmp_path)


def test_exported_files_need_jax_alone(run, images, tmp_path):
    trained = load.load(run[0])
    about = export.export(trained, tmp_path / "out")
    assert about["largest_difference"] < 1e-5
    assert json.loads((tmp_path / "out" / "about.json").read_text()) == about
    np.save(tmp_path / "images.npy", images.images)
    subprocess.run(
        [
            *(sys.executable, "-c", CLASSIFY, tmp_path / "out"),
            *(tmp_path / "images.npy", tmp_path / "logits.npy"),
        ],
        cwd=tmp_path,
        env={"PATH": "", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"),
        trained.logits(images.images),
        atol=1e-4,
    )
    names = {
        leaf.split("/")[-1] for leaf in export.folded_network(trained).params
    }
    assert not names & {"mean", "var"}


def test_nothing_is_exported_through_a_link(run, tmp_path):
    link = run[0] / "exported"
    link.symlink_to(tmp_path)
    try:
        with pytest.raises(UserError, match="exported is a symbolic link"):
            export.main([str(run[0])])
    finally:
        link.unlink()
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocessing, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        loop.train(small_config(epochs=1), tmp_path / "run")
