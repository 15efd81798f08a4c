"""Runs with the data on the device: variants, configs, and one on digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10_94, cifar10_96
from tests.helpers.fast_runs import CLASSES, Run, experiment_of, small
from train import UserError, data, load, seeds
from train.duration import count_steps
from train.experiment import build_experiment


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16", "argument": "muon"},
        {"dtype": "bfloat16", "cutout": 6, "layers": 3},
        {"norm": "ghost", "norm_options": {"normalize_over": 8}},
        {"norm": "flax"},
        {"norm": "none", "learning_rate": 0.002},
    ],
    ids=str,
)
def test_variants_take_a_step(changes):
    layers = changes.pop("layers", 2)
    config = small(epochs=1 / 6, widths=(8,), **changes)
    config.fastnet.layers = layers
    states, (sums,) = Run(config).train()
    # With the logits about zero all classes are as likely.
    assert sums.loss / sums.count == pytest.approx(np.log(CLASSES), rel=0.1)
    state = states[-1]
    for leaf in jax.tree.leaves((state.params, state.batch_stats)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()


def digits_config(**changes):
    config = small(
        dataset="digits",
        flip="none",
        batch_size=64,
        test_batch_size=200,
        epochs=3.5,
        num_seeds=2,
        learning_rate=0.3,
        cpu_devices=8,
        widths=(8, 16, 16),
        **changes,
    )
    config.fastnet.logit_scale = 0.5
    config.fastnet.whitening_bias_epochs = 9
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fast") / "run"
    return workdir, seeds.train(digits_config(), workdir)


def test_learns_and_reports(finished):
    workdir, summary = finished
    assert min(summary["test_accuracy_of_seeds"]) > 0.85
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["steps"] == 77
    for name in seeds.RESULTS:
        values = summary[f"{name}_of_seeds"]
        assert summary[name] == pytest.approx(np.mean(values))
        assert summary[f"{name}_deviation"] == pytest.approx(
            np.std(values, ddof=1)
        )
    one = json.loads((workdir / "seed-1" / "summary.json").read_text())
    assert one["test_accuracy"] == summary["test_accuracy_of_seeds"][1]
    assert 0 < one["training_seconds"] < one["seconds"]
    # Tested once, after the last epoch, which is a half.
    (line,) = (workdir / "seed-1/metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["epoch"], record["step"]) == (4, 77)
    assert record["test_accuracy_augmented"] == one["test_accuracy_augmented"]


def test_finished_seeds_are_not_trained_again(finished):
    workdir, summary = finished
    again = seeds.train(digits_config(), workdir)
    assert again == summary
    with pytest.raises(UserError, match="holds another run"):
        seeds.train(digits_config(momentum=0.5), workdir)


def test_the_trained_network_is_loaded_with_its_filters(finished):
    workdir, summary = finished
    trained = load.load(workdir / "seed-0")
    assert {*trained.variables} == {"params", "batch_stats", "frozen"}
    split = data.load_dataset("digits").test
    correct = trained.logits(split.images).argmax(-1) == split.labels
    want = summary["test_accuracy_of_seeds"][0]
    assert float(correct.mean()) == pytest.approx(want)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "mouon"}, "did you mean 'muon'"),
        ({"flip": "alternate"}, "did you mean 'alternating'"),
        ({"crop_mode": "reflekt"}, "did you mean 'reflect'"),
        ({"dtype": "float8"}, "dtype='float8' is unknown"),
        ({"norm": "jaxbm"}, "norm='jaxbm' is unknown"),
        ({"epochs": 1e-7}, r"epochs must be in \[1e-6, 1e6\]; got 1e-07"),
        ({"batch_size": 2000}, "exceeds the 1437 examples of digits"),
        ({"cutout": 8}, "cutout=8 must be less than the 8 pixels"),
        ({"widths": ()}, "fastnet.widths must not be empty"),
        ({"data_on_device": False}, "steps_per_dispatch=0, an epoch at once"),
    ],
    ids=str,
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        build_experiment(small(dataset="digits", **changes))


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
    experiment = experiment_of(config, dataset=FULL)
    found = experiment.steps
    assert found.total == steps
    assert sum(map(found.of, range(found.epochs))) == steps
    schedule = experiment.schedule
    got = float(schedule(0)), float(schedule(steps))
    np.testing.assert_allclose(
        got, np.multiply(ends, config.learning_rate), atol=1e-6
    )


def test_published_rates():
    """Rate and decay per step, as the published program passes to PyTorch."""
    config = cifar10_94.get_config()
    # lr / (1024 (1 + 1 / 0.15)) for the sum of the losses of 1024.
    np.testing.assert_allclose(config.learning_rate, 11.5 / (1 + 1 / 0.15))
    np.testing.assert_allclose(
        config.learning_rate * config.weight_decay, 0.0153 / (1 + 1 / 0.15)
    )
    muon = cifar10_94.get_config("muon")
    per_step = muon.learning_rate * muon.weight_decay
    np.testing.assert_allclose(per_step, 2e-6 * 2000)
    np.testing.assert_allclose(
        muon.learning_rate * muon.affine_lr_multiplier, 0.053 * 2000
    )


def test_the_last_epoch_is_a_part_of_one():
    experiment = experiment_of(cifar10_94.get_config(), dataset=FULL)
    steps, recipe = experiment.steps, experiment.recipe
    found = [(steps.of(e), recipe.phase(e)) for e in range(steps.epochs)]
    assert found == [(48, 0)] * 3 + [(48, 1)] * 6 + [(44, 1)]
    # Rounding does not add a step.
    config = cifar10_94.get_config()
    config.epochs = 9.0 + 1e-9
    assert count_steps(config, FULL) == (48, 9 * 48)
