"""Fast runs: variants, configs, command lines and a whole run on digits."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10_94, cifar10_96, digits
from tests.helpers.command_line import run as run_command
from tests.helpers.fast_runs import (
    CLASSES,
    DATASET,
    first_batch,
    norm_of,
    small,
)
from train import UserError, data, output
from train.fast import optimizer, programs, step
from train.fast.recipe import build_experiment, make_recipe
from train.fast.run import table, train


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16", "optimizer": "muon"},
        {"dtype": "bfloat16", "cutout": 6, "layers": 3},
        {"norm": "ghost", "norm_options": {"normalize_over": 8}},
        {"norm": "flax"},
        {"norm": "none", "learning_rate": 1.0},
    ],
    ids=str,
)
def test_variants_take_a_step(monkeypatch, changes):
    monkeypatch.setattr(data, "load", lambda *_, **__: DATASET)
    experiment = build_experiment(small(widths=(8,), **changes))
    recipe = experiment.recipe

    @jax.jit
    def one(train, batch):
        state = step.init_state(recipe, train, 0)
        return step.train_step(recipe, state, train, batch, train_bias=True)

    state, loss = one(DATASET.train, first_batch(recipe.cutout))
    # With the logits about zero all classes are as likely.
    assert float(loss) == pytest.approx(math.log(CLASSES), rel=0.1)
    for leaf in jax.tree.leaves((state.params, state.batch_stats)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def test_learns_and_reports(tmp_path, capsys):
    config = small(
        dataset="digits",
        flip="none",
        widths=(8, 16, 16),
        logit_scale=0.5,
        whitening_bias_epochs=9,
        batch_size=64,
        test_batch_size=200,
        epochs=3.5,
        seeds=2,
    )
    summary = train(config, tmp_path / "run")
    assert min(summary["test_accuracy_of_seeds"]) > 0.85
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["steps"] == 77
    accuracies = summary["test_accuracy_of_seeds"]
    assert summary["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert summary["test_accuracy_deviation"] == pytest.approx(
        np.std(accuracies, ddof=1)
    )
    assert summary["images_per_second"] == pytest.approx(
        77 * 64 / summary["seconds"]
    )
    assert not summary["on_accelerator"]
    out = capsys.readouterr().out
    assert out.count("times and images/s are not") == 2
    assert out.count("\nseed ") == 2 and output.wrap(table(summary)) in out
    assert "test accuracy, test-time augmentation" in out
    with pytest.raises(UserError, match="holds another run"):
        train(small(dataset="digits", epochs=1.0), tmp_path / "run")
    assert train(config, tmp_path / "run") == summary
    assert output.wrap(table(summary)) in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "mouon"}, "did you mean 'muon'"),
        ({"flip": "alternate"}, "did you mean 'alternating'"),
        ({"dtype": "float8"}, "dtype='float8' is unknown"),
        ({"norm": "jaxbm"}, "norm='jaxbm' is unknown"),
        ({"epochs": 0.0}, r"epochs must be in \(0, 1e6\]; got 0.0"),
        ({"batch_size": 0}, r"batch_size must be in \[1, 1e6\]; got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
        ({"translate": -1}, r"translate must be in \[0, 1000\]; got -1"),
        ({"layers": 4}, r"layers must be in \[2, 3\]; got 4"),
        ({"widths": (8, 0, 8)}, "every entry of widths must be in"),
        ({"devices": 3}, "batch_size=16 must be divisible by devices=3"),
        (
            {"devices": 16},
            "devices=16, but only 8 are available. Simulate more",
        ),
        ({"batch_size": 2000}, "exceeds the 1437 examples of digits"),
        ({"cutout": 32}, "cutout=32 must be less than the 32 pixels"),
    ],
    ids=str,
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(small(dataset="digits", **changes))


def test_digits_are_enlarged():
    experiment = build_experiment(small(dataset="digits"))
    images = experiment.dataset.train.images
    assert images.shape[1:] == (32, 32, 1)
    np.testing.assert_array_equal(
        images[:, ::4, 1::4], data.load("digits").train.images
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.epoch=3"], "There is no config.epoch; did you mean"),
        (
            ["--config=none.py"],
            "There is no file none.py; configs/ holds cifar10_94.py, ",
        ),
        (["--config.seeds=0"], "seeds must be in [1, 10000]; got 0."),
        ([f"--config={digits.__file__}"], "The config has no bias_scale: it"),
        (
            [f"--config={cifar10_94.__file__}:adam"],
            "configs/cifar10_94.py has no 'adam'; use one of sgd, muon",
        ),
    ],
)
def test_bad_command_line_is_one_clear_line(arguments, message):
    done = run_command(*arguments, module="train.fast")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train.fast: {message}")


FULL = data.Dataset(
    data.Split(np.zeros((50_000, 16, 16, 3), np.uint8), np.zeros(50_000, int)),
    data.Split(np.zeros((10_000, 16, 16, 3), np.uint8), np.zeros(10_000, int)),
    CLASSES,
)


@pytest.mark.parametrize(
    "config, steps, ends",
    [
        # ceil(48 x 9.9), 48 x 37 and 25 x 8 steps.
        (cifar10_94.get_config(), 476, (0.2, 0.07)),
        (cifar10_94.get_config("muon"), 200, (1.0, 0.0)),
        (cifar10_96.get_config(), 1776, (0.2, 0.0)),
    ],
)
def test_configs_stand_for_the_published_steps(config, steps, ends):
    made = make_recipe(config, FULL, norm_of())
    assert made.steps == steps
    assert (
        sum(
            programs.epoch_signature(made, epoch)[0]
            for epoch in range(programs.epochs(made))
        )
        == steps
    )
    rate = optimizer.triangular_schedule(
        steps,
        start=config.rate_start,
        peak=config.rate_peak,
        end=config.rate_end,
    )
    got = float(rate(0)), float(rate(steps))
    np.testing.assert_allclose(got, ends, atol=1e-6)


def test_the_last_epoch_is_a_part_of_one():
    made = make_recipe(cifar10_94.get_config(), FULL, norm_of())
    signatures = [programs.epoch_signature(made, epoch) for epoch in range(10)]
    assert signatures == [(48, True)] * 3 + [(48, False)] * 6 + [(44, False)]
