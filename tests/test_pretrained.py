"""Networks that come with the repository, and how they are added."""

import numpy as np
import pytest

from tests.helpers.recipes import small_config
from train import UserError, data, export, load, loop, pretrained


def test_the_digits_network_has_its_accuracy(monkeypatch):
    split = data.load_dataset("digits").test
    monkeypatch.setattr(
        data, "load_dataset", None
    )  # nothing reads the data set
    trained = pretrained.load_network("digits_resnet8")
    correct = trained.logits(split.images).argmax(-1) == split.labels
    want = pretrained.results("digits_resnet8")["test_accuracy"]
    assert want > 0.97
    # Weights are rounded to float16: one image in 360 may differ.
    assert abs(float(correct.mean()) - want) < 1.5 / 360


@pytest.mark.parametrize("name", pretrained.names())
def test_every_network_is_small_and_answers(name):
    path = pretrained.FOLDER / name / pretrained.WEIGHTS
    assert path.stat().st_size < 1_000_000
    trained = pretrained.load_network(name)
    shape = trained.preprocess.image_shape
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    logits = trained.logits(images)
    assert logits.shape == (3, trained.preprocess.num_classes)
    assert np.isfinite(logits).all() and logits.dtype == np.float32
    assert trained.config.data_dir is None


def test_a_run_is_added(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    run = tmp_path / "run"
    summary = loop.train(small_config(epochs=1), run)
    pretrained.main([str(run), "mine"])
    assert pretrained.names() == ["mine"]
    assert pretrained.results("mine") == summary
    trained, before = pretrained.load_network("mine"), load.load(run)
    assert trained.step == before.step
    images = data.load_dataset("digits", test_split="test[:50]").test.images
    np.testing.assert_allclose(
        trained.logits(images), before.logits(images), rtol=0.05, atol=0.05
    )
    capsys.readouterr()
    pretrained.main([])
    accuracy = f"{summary['test_accuracy']:.2%}"
    assert capsys.readouterr().out == f"mine  test accuracy {accuracy}\n"
    with pytest.raises(UserError, match="mine exists; remove it"):
        pretrained.main([str(run), "mine"])
    with pytest.raises(UserError, match="NAME must consist of letters"):
        pretrained.main([str(run), "../x"])
    with pytest.raises(UserError, match="NAME must consist of letters"):
        pretrained.main([str(run)])


def test_a_name_that_is_none():
    with pytest.raises(UserError, match="no network 'x'; there are .*digits"):
        pretrained.load_network("x")


def test_one_is_exported(tmp_path):
    with pytest.raises(UserError, match="set --out"):
        export.main(["digits_resnet8"])
    export.main(["digits_resnet8", "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"about.json", "program.bin", "weights.safetensors"}
