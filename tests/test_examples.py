"""The scripts of the documentation run, and are what its notebooks hold."""

import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat
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


SCRIPTS = sorted(FOLDER.glob("*.py"))


def test_every_script_is_on_the_page():
    page = (FOLDER.parent / "examples.markdown").read_text()
    for script in SCRIPTS:
        assert f"{{{{ example {script.stem} }}}}" in page


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """The folder of notebooks, as the build of the documentation writes it."""
    site = tmp_path_factory.mktemp("site")
    code = "import pathlib, sys, scripts; "
    code += "scripts.write_notebooks(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, site],
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent / "extensions")},
        check=True,
    )
    return site / "notebooks"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_notebook_is_the_script(notebooks, script):
    book = json.loads((notebooks / f"{script.stem}.ipynb").read_text())
    nbformat.validate(nbformat.from_dict(book))
    got = [
        (cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]
    ]
    assert not any(cell.get("outputs") for cell in book["cells"])
    want = []
    parts = re.split(r"^# %%(.*)\n", script.read_text(), flags=re.M)
    assert parts[0] == ""  # no code before the first cell
    for kind, text in zip(parts[1::2], parts[2::2]):
        if kind.strip() == "[markdown]":
            text = re.sub(r"^# ?", "", text, flags=re.M)
            want.append(("markdown", text.strip()))
        else:
            want.append(("code", text.strip()))
    assert got == want
