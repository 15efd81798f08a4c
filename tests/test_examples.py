"""The scripts of the documentation run from beginning to end."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "jaxbn" / "docs" / "examples"


def run(name):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def percent(text, label):
    return float(re.search(rf"{label}.* ([\d.]+)%", text)[1])


def test_nnx_data_parallel():
    assert percent(run("nnx_data_parallel"), "epoch 4") > 75


@pytest.mark.slow
def test_gan_with_ids():
    text = run("gan_with_ids")
    assert "rows of running statistics: (2, 32)" in text
    radius = float(re.search(r"generated points: ([\d.]+)", text)[1])
    assert 0.6 < radius < 1.4


@pytest.mark.slow
def test_finetune_fold_export():
    text = run("finetune_fold_export")
    assert percent(text, "ten digits") > 75
    tuned = percent(text, "even or odd")
    assert tuned > 70
    assert percent(text, "the exported program") == tuned


def test_every_script_is_on_the_page():
    page = (FOLDER.parent / "examples.myst").read_text()
    for script in FOLDER.glob("*.py"):
        assert f"examples/{script.name}" in page
