"""Why batch norm works: reports, and what must hold for every seed."""

import functools
import json
import re
import struct
import subprocess
import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.command_line import run as run_command
from train import UserError
from train.why import EXPERIMENTS, data, depth, gradient, invariance, tolerance
from train.why import __main__ as why
from train.why.data import Settings
from train.why.experiment import Experiment, Finding
from train.why.methods import METHODS
from train.why.report import write, write_page
from train.why.words import held, largest, percent, span

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def digits():
    return data.load_data(Settings())


def finding(name="made", **changes):
    def draw(figure):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1])
        axes.set(xlabel="step", ylabel="loss (nats)")

    numbers = {
        "array": np.arange(3.0),
        "nan": jnp.float32(jnp.nan),
        "nested": {"flag": np.bool_(True), 7: (np.int32(3), float("inf"))},
    }
    measured = ["It is 0.4.", "Less: held for 3 of 3 seeds."]
    known = Finding(name, "Title", "A claim.", "0.5.", measured, numbers, draw)
    return known._replace(**changes)


def test_a_finding_is_a_figure_and_its_numbers(tmp_path):
    folder = tmp_path / "new" / "folder"
    path = write(finding(), folder, settings=Settings(seeds=(3,)))
    assert path == folder / "made.png"
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert sorted(p.name for p in folder.iterdir()) == ["made.json", "made.png"]
    kept = json.loads((folder / "made.json").read_text())
    assert kept["claim"] == "A claim."
    assert kept["measured"] == ["It is 0.4.", "Less: held for 3 of 3 seeds."]
    assert kept["settings"]["seeds"] == [3]
    assert kept["numbers"] == {
        "array": [0.0, 1.0, 2.0],
        "nan": None,
        "nested": {"flag": True, "7": [3, None]},
    }


def test_figures_are_seven_inches_wide(tmp_path):
    experiment = Experiment(
        lambda settings, data: {},
        lambda numbers: [],
        lambda axes, numbers: axes[0].plot([0, 1], label="line"),
        panels=("Loss | step | loss (nats)",),
        shape=(1, 1),
        height=3,
    )
    draw = functools.partial(experiment.picture, {})
    header = write(finding(draw=draw), tmp_path).read_bytes()[16:24]
    assert struct.unpack(">II", header) == (1050, 450)


def test_a_page_has_figures_and_captions(tmp_path):
    findings = [finding(), finding("other", title="Another")]
    page = write_page(findings, tmp_path, Settings(seeds=(0, 3)))
    lines = page.read_text().splitlines()
    assert page == tmp_path / "report.md"
    assert lines[2].startswith("Data: digits. Seeds: 0, 3. 20")
    assert lines[2].endswith(f"jax {jax.__version__}, flax {flax.__version__}.")
    assert lines[4:] == [
        *("## Title", "", "![Title](made.png)", ""),
        *("**Claim.** A claim.", "", "**Published.** 0.5.", ""),
        *("**Measured.**", "", "- It is 0.4."),
        *("- Less: held for 3 of 3 seeds.", ""),
        *("## Another", "", "![Another](other.png)", ""),
        *lines[8:16],
    ]


def test_a_figure_that_cannot_be_drawn_is_not_written(tmp_path):
    def draw(figure):
        raise RuntimeError("no axes")

    with pytest.raises(RuntimeError, match="no axes"):
        write(finding(draw=draw), tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_words_come_from_numbers():
    assert span([0.5, 0.25]) == "0.25 to 0.5" and span(2.0) == "2"
    assert percent([0.571, 0.594]) == "57 to 59%" and percent(1) == "100%"
    assert largest([0.00312, 0.001]) == "0.00312" and largest(0) == "0"
    assert largest(8.94e-16) == "8.9e-16" and largest([151.2]) == "151"
    assert largest([2.64e-7, 1e-9]) == "2.6e-7"
    assert held("More", [True, True]) == "More: held for 2 of 2 seeds."
    assert held("More", [True, False]) == "More: held for only 1 of 2 seeds."
    assert held("More", [False] * 3) == "More: not reproduced (0 of 3 seeds)."


def made(monkeypatch, **runs):
    """Puts experiments in the place of the real ones."""
    for name, run in runs.items():
        claim = f"The claim of {name}."
        experiment = types.SimpleNamespace(run=run, claim=claim)
        module = types.SimpleNamespace(EXPERIMENT=experiment)
        monkeypatch.setitem(sys.modules, f"train.why.{name}", module)
    monkeypatch.setattr(why, "EXPERIMENTS", tuple(runs))


def test_a_failure_does_not_lose_the_others(monkeypatch, tmp_path, capsys):
    seen = []

    def good(settings):
        seen.append(settings)
        return finding("good")

    def broken(settings):
        raise ZeroDivisionError("by zero")

    def absent(settings):
        raise UserError("CIFAR is not there.")

    def other(settings):
        return finding("other", title="Other", measured=[])

    made(monkeypatch, broken=broken, absent=absent, good=good, other=other)
    message = "2 of 4 experiments failed: broken, absent. The results of"
    with pytest.raises(UserError, match=message):
        why.main(["--out", str(tmp_path), "--seeds=2", "--quick"])
    assert seen == [Settings(seeds=(0, 1), quick=True)]
    assert (tmp_path / "good.png").exists()
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert re.fullmatch(r"broken \(\d+\.\d s\)", lines[0])
    assert lines[1] == "- failed: ZeroDivisionError, as shown above"
    assert lines[3] == "- failed: CIFAR is not there."
    assert lines[5:7] == ["- It is 0.4.", "- Less: held for 3 of 3 seeds."]
    page = (tmp_path / "report.md").read_text()
    heads = re.findall("^## .*", page, re.MULTILINE)
    assert heads == ["## Title", "## Other"]
    assert shown.err.count("ZeroDivisionError: by zero") == 1
    assert "UserError" not in shown.err


def test_named_experiments_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    made(
        monkeypatch,
        one=lambda settings: finding("one"),
        two=lambda settings: finding("two"),
    )
    why.main(["two", "two"])
    (folder,) = (tmp_path / "runs").glob("why-*")
    written = {path.name for path in folder.iterdir()}
    assert written == {"two.png", "two.json", "report.md"}
    assert str(folder.name) in capsys.readouterr().out.splitlines()[-1]
    why.main(["--list"])
    assert capsys.readouterr().out.splitlines() == [
        "one         The claim of one.",
        "two         The claim of two.",
    ]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="Cannot write to --out="):
        why.main(["--out", str(blocked / "below")])


def test_bad_command_lines():
    with pytest.raises(UserError, match="at least 1; got 0"):
        why.main(["--seeds=0"])
    with pytest.raises(UserError, match="There are invariance, tolerance"):
        why.main(["zzz"])
    done = run_command("tolerence", module="train.why")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "train.why: Unknown experiment 'tolerence'. Did you mean tolerance? "
    )


def test_every_experiment_has_a_claim(capsys):
    why.main(["--list"])
    shown = capsys.readouterr().out
    for name in EXPERIMENTS:
        assert re.search(rf"^{name} +\w", shown, re.MULTILINE)
        experiment = why.experiment(name)
        assert experiment.name == name
        stated = experiment.paragraphs()
        document = sys.modules[f"train.why.{name}"].__doc__
        assert document.startswith(f"{stated['title']}.\n\nClaim: ")
        assert "\n\nPublished: " in document and all(stated.values())
        assert len(experiment.panels) == np.prod(experiment.shape)
        assert {panel.count(" | ") for panel in experiment.panels} == {2}


# What the experiments find. Bands are those of all seeds that were tried.


def test_a_bias_before_a_mean_grows_by_its_formula():
    found = gradient.minimal(SEEDS)
    k = np.arange(1, gradient.MINIMAL_STEPS + 1)
    want = 2 * gradient.MINIMAL_RATE * k * found["mean_t"][:, None]
    np.testing.assert_allclose(found["outside"], want, rtol=1e-11)
    assert np.abs(found["inside"]).max() < 1e-13
    for way in ("inside", "outside"):
        assert np.ptp(found[f"loss_{way}"], axis=1).max() < 1e-12


def test_weight_decay_is_a_growing_learning_rate(digits):
    with jax.enable_x64(True):
        setting = digits.setting(SEEDS, steps=100, batch_size=64)
        losses = {
            name: np.asarray(
                invariance.decayed(
                    setting,
                    sizes=digits.sizes(24),
                    **invariance.METHODS[name].options,
                )
            )
            for name in ("with", "without")
        }
    apart = {name: abs(a[:, 0] - a[:, 1]) for name, a in losses.items()}
    assert losses["with"].shape == (2, 2, 100)
    assert apart["with"].max() < 1e-12
    assert (apart["without"].max(1) > 0.1).all()
    learned = losses["with"][:, 0]
    assert (learned[:, -1] < 0.7 * learned[:, 0]).all()


def test_growth_of_gradients_at_the_start(digits):
    """Yang et al. (2019): 1.211 a ReLU layer, for wide nets."""
    kernels = depth.draw_kernels(SEEDS, 64, 256, 30)
    x, options = digits.train[0][:64], METHODS["with"].options
    rows = np.asarray(depth.gradient_norms(kernels, x, **options))
    got = depth.growth(rows)
    low, high = depth.BAND
    assert (low < got).all() and (got < high).all(), got
    exact = 3.0 ** -np.arange(20.0)[None]
    np.testing.assert_allclose(depth.growth(exact), 3.0)


def test_share_of_a_residual_block(digits):
    """De and Smith (2020): 1 / (l + 1)."""
    kernels = depth.draw_kernels(SEEDS, 64, 256, 32)
    x, options = digits.train[0][:128], METHODS["with"].options
    variance, share = map(np.asarray, depth.residual(kernels, x, **options))
    expected = 1 / (np.arange(1, 33) + 1)
    np.testing.assert_allclose(share[:, 3:], [expected[3:]] * 2, rtol=0.2)
    growth = np.diff(variance, axis=1)
    assert variance[:, -1].max() < 33 and growth.min() > 0


def test_the_rate_that_a_scale_wants():
    rates = np.array([0.01, 0.1, 1.0])
    accuracy = np.array([[[0.2, 0.6, 1.0], [0.9, 1.0, 1.0], [0.1, 0.2, 0.3]]])
    got = tolerance.wanted_rates(accuracy, rates, 0.8)
    np.testing.assert_allclose(got, [[np.sqrt(0.1), np.nan, np.nan]])
    got = tolerance.exponent(
        np.array([0.5, 1.0, 4.0]), np.array([[3.0, 0.1, 6.4]]), 1.0, 4.0
    )
    np.testing.assert_allclose(got, 3.0)


def test_a_claim_that_does_not_hold_is_reported():
    numbers = {
        "scales": np.ones(5),
        "rates": np.ones(9),
        "best": 0.99,
        "good": {"with": np.array([3, 3]), "without": np.array([25, 27])},
        "exponent": np.array([np.nan, 2.0]),
    }
    first, second = tolerance.verdict(numbers)  # none on the exponent
    assert first.startswith("3 of 45 combinations of learning rate and scale")
    assert "with batch norm, 25 to 27 without" in first
    assert second == "More with batch norm: not reproduced (0 of 2 seeds)."


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["invariance", "tolerance", "depth", "gradient"]
)
def test_experiments_hold_for_every_seed(name, tmp_path):
    settings = Settings(quick=True)
    found = why.experiment(name).run(settings)
    assert any("held for 3 of 3 seeds." in text for text in found.measured)
    path = write(found, tmp_path, settings=settings)
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["name"] == name and kept["numbers"]
    assert path.stat().st_size > 30_000


@pytest.mark.slow
def test_tolerance_in_full(digits):
    found = tolerance.EXPERIMENT.run(Settings())
    good = found.numbers["good"]
    assert (good["with"] >= 20).all() and (good["without"] <= 6).all()
    power = found.numbers["exponent"]
    assert (power > 1.5).all() and (power < 2.3).all()


@pytest.mark.slow
def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train.why", "gradient", "--quick"]
        + ["--seeds=1", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / "gradient.png").exists()
    assert "held for 1 of 1 seeds." in done.stdout
