"""Augmentation, steps and whole runs on a small part of the digits."""

import functools
import json
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from configs import digits, resnet20_cifar10, resnet20_cifar10_short
from jaxbn.linen import BatchNorm
from train import (
    UserError,
    augment,
    checkpoint,
    data,
    files,
    loop,
    report,
    seeds,
    topology,
)
from train import recipe as recipes
from train.norms import norm_of
from train.resnet import ResNet
from train.step import (
    Recipe,
    init_state,
    make_optimizer,
    make_test_step,
    make_train_step,
)


def small_config(**changes):
    config = digits.get_config()
    config.update(
        width=4,
        epochs=3,
        batch_size=64,
        test_batch_size=64,
        train_split="train[:256]",
        test_split="test[:100]",
    )
    config.update(changes)
    return config.lock()


@pytest.fixture(scope="module")
def images():
    return data.load("digits", train_split="train[:256]")


def make_recipe(**changes):
    optimizer = make_optimizer(
        lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4
    )
    recipe = Recipe(
        model=ResNet(
            depth=8,
            num_classes=10,
            width=4,
            norm=functools.partial(BatchNorm, momentum=0.9, axis_name="data"),
        ),
        optimizer=optimizer,
        pixel_mean=(80.0,),
        pixel_std=(90.0,),
        padding=1,
        flip=True,
        seed=0,
    )
    return recipe._replace(**changes)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


# Augmentation


def test_augmentation_is_a_function_of_the_example():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(8, 6, 6, 2)), jnp.float32)
    index = jnp.array([5, 3, 900, 4, 11, 0, 2, 1])
    change = functools.partial(augment.crop_and_flip, padding=2, flip=True)
    keys = augment.example_keys(jax.random.key(0), index)
    together = change(batch, keys)
    alone = change(batch[2:3], keys[2:3])
    chex.assert_trees_all_equal(together[2:3], alone)
    other = change(batch, augment.example_keys(jax.random.key(1), index))
    assert (np.asarray(other) != np.asarray(together)).any()


def test_every_crop_and_mirror_occurs_and_nothing_else():
    padding, size = 1, 4
    image = 1.0 + jnp.arange(size * size).reshape(size, size, 1)
    padded = np.pad(np.asarray(image), [(padding,) * 2] * 2 + [(0, 0)])
    possible = set()
    for i in range(2 * padding + 1):
        for j in range(2 * padding + 1):
            crop = padded[i : i + size, j : j + size]
            possible |= {crop.tobytes(), crop[:, ::-1].tobytes()}
    keys = augment.example_keys(jax.random.key(0), jnp.arange(500))
    got = augment.crop_and_flip(
        jnp.broadcast_to(image, (500, size, size, 1)),
        keys,
        padding=padding,
        flip=True,
    )
    assert {np.asarray(one).tobytes() for one in got} == possible


def test_pixel_statistics_are_exact():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    parts = [augment.pixel_counts(part) for part in np.split(pixels, [7, 9])]
    mean, std = augment.pixel_statistics(sum(parts))
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-12)
    floats = augment.to_float(pixels, jnp.array(mean), jnp.array(std))
    np.testing.assert_allclose(floats.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(floats.std((0, 1, 2)), 1, rtol=1e-5)


# Network and optimizer


@pytest.mark.parametrize("depth, count", [(20, 269_722), (56, 853_018)])
def test_size_of_the_network(depth, count):
    # Table 6 of the paper rounds these to 0.27M and 0.85M.
    model = ResNet(depth=depth, num_classes=10)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 32, 32, 3)),
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == count


def test_network_errors():
    model = ResNet(depth=21, num_classes=10)
    with pytest.raises(UserError, match=re.escape("depth=21 is not 6n + 2")):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)


def test_zero_init_gamma_starts_as_the_shortcut():
    model = ResNet(depth=8, num_classes=10, zero_init_gamma=True)
    params = model.init(
        jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False
    )["params"]
    for block in ("Block_0", "Block_1", "Block_2"):
        first, last = (params[block][f"BatchNorm_{i}"] for i in (0, 1))
        assert (first["scale"] == 1).all() and (last["scale"] == 0).all()


def test_only_kernels_decay():
    optimizer = make_optimizer(
        optax.constant_schedule(1.0),
        momentum=0.0,
        nesterov=False,
        weight_decay=0.1,
    )
    params = {
        "Conv_0": {"kernel": jnp.ones(2)},
        "BatchNorm_0": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "Dense_0": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = jax.tree.map(lambda u: bool((u != 0).all()), updates)
    assert decayed == {
        "Conv_0": {"kernel": True},
        "BatchNorm_0": {"scale": False, "bias": False},
        "Dense_0": {"kernel": True, "bias": False},
    }


def test_schedules():
    config = resnet20_cifar10.get_config()
    rate = recipes.make_schedule(config, 390)
    got = [float(rate(s)) for s in (0, 31_999, 32_001, 48_001, 63_959)]
    np.testing.assert_allclose(got, [0.1, 0.1, 0.01, 0.001, 0.001], rtol=1e-5)
    config.update(schedule="cosine", warmup_epochs=1.0, epochs=10)
    rate = recipes.make_schedule(config, 100)
    got = [float(rate(s)) for s in (0, 49, 500, 1000)]
    want = [0.001, 0.05 * (1 + np.cos(np.pi * 0.049)) / 2, 0.05, 0.0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-8)
    config = resnet20_cifar10_short.get_config()
    rate = recipes.make_schedule(config, 390)
    steps = 390 * config.epochs
    peak = max(float(rate(s)) for s in range(0, steps, 13))
    np.testing.assert_allclose(peak, config.learning_rate, rtol=1e-3)
    assert float(rate(steps - 1)) < 1e-3 * peak


# Steps


def test_steps_are_the_same_on_any_number_of_devices(images, monkeypatch):
    """With a smooth nonlinearity, whose derivative moves with its input.

    A ReLU at zero makes of the last bit of a sum the whole of a gradient:
    with it runs agree as well until a rounding falls there, and then no more.
    """
    monkeypatch.setattr(nn, "relu", nn.gelu)
    recipe = make_recipe()

    def run(devices):
        mesh = mesh_of(devices)
        step = make_train_step(recipe, mesh)
        state = init_state(recipe, (8, 8, 1), mesh)
        losses = []
        for epoch in range(3):
            batches = data.train_batches(images.train, 64, seed=0, epoch=epoch)
            for batch in batches:
                state, sums = step(state, batch, epoch)
                losses.append(float(sums.loss))
                assert sums.count == 64
        return losses, state

    want = run(1)
    for devices in (4, 8):
        chex.assert_trees_all_close(run(devices), want, rtol=1e-4, atol=2e-6)
    start = init_state(recipe, (8, 8, 1), mesh_of(1))
    same = jax.tree.map(
        lambda a, b: np.allclose(a, b, atol=1e-4), start.params, want[1].params
    )
    assert not any(jax.tree.leaves(same)), "training must move every leaf"


def test_evaluation_counts_every_image_once(images):
    recipe = make_recipe()
    mesh = mesh_of(8)
    state = init_state(recipe, (8, 8, 1), mesh)
    step = make_test_step(recipe, mesh)
    sums = [
        step(state.params, state.batch_stats, batch)
        for batch in data.test_batches(images.test, 64)
    ]
    total = jax.tree.map(lambda *a: float(sum(a)), *sums)
    inputs = (images.test.images.astype(np.float32) - 80) / 90
    logits = recipe.model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        inputs,
        train=False,
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    labels = images.test.labels
    assert total.count == len(labels) == 360
    assert total.correct == (log_p.argmax(1) == labels).sum()
    want = -log_p[np.arange(360), labels].sum()
    np.testing.assert_allclose(total.loss, want, rtol=1e-5)


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.train(small_config(profile=True), workdir)


def records_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_a_run_leaves(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert set(summary) == {
        "test_accuracy",
        "test_loss",
        "epochs",
        "steps",
        "devices",
        "processes",
        "device_kind",
        "versions",
        "seconds",
        "images_per_second",
        "time",
    }
    assert (summary["epochs"], summary["steps"]) == (3, 12)
    assert summary["devices"] == 8
    records = records_of(workdir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records:
        assert set(record) == {
            "epoch",
            "step",
            "train_loss",
            "train_accuracy",
            "test_loss",
            "test_accuracy",
            "learning_rate",
            "images_per_second",
            "skipped",
        }
        assert 0 <= record["test_accuracy"] <= 1
        # Of 100 images: a padded or dropped one would show.
        hundred = 100 * record["test_accuracy"]
        assert abs(hundred - round(hundred)) < 1e-9
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    assert json.loads((workdir / "config.json").read_text())["width"] == 4
    assert (workdir / "curves.png").read_bytes()[1:4] == b"PNG"
    assert list(workdir.glob("events.out.tfevents.*"))
    assert (workdir / "checkpoints" / "12").is_dir()


def test_a_trace_of_some_steps(finished):
    workdir, _ = finished
    assert [*(workdir / "profile").rglob("perfetto_trace.json.gz")]
    assert [*(workdir / "profile").rglob("*.xplane.pb")]


def test_seeds_are_runs_of_their_own(tmp_path, monkeypatch):
    ran = []

    def train(config, workdir):
        ran.append((config.seed, config.seeds))
        summary = {
            "test_accuracy": {3: 0.5, 4: 0.75, 5: 0.7}[config.seed],
            "epochs": 3,
            "steps": 12,
            "seconds": 1.0,
        }
        files.write_json(workdir / "summary.json", summary)
        return summary

    monkeypatch.setattr(loop, "train", train)
    got = seeds.train(small_config(seed=3, seeds=2), tmp_path)
    assert ran == [(3, 1), (4, 1)]
    assert got["test_accuracies"] == [0.5, 0.75]
    assert got["test_accuracy"] == 0.625
    np.testing.assert_allclose(got["test_accuracy_deviation"], 0.125 * 2**0.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == got
    seeds.train(small_config(seed=3, seeds=3), tmp_path)
    assert ran[2:] == [(5, 1)], "what is finished is not run again"
    with pytest.raises(UserError, match="there momentum is 0.9, here 0.5"):
        seeds.train(small_config(seed=3, seeds=3, momentum=0.5), tmp_path)


def test_finished_run_is_not_run_again(finished):
    workdir, summary = finished

    def state():
        files = (
            path
            for path in workdir.rglob("*")
            if path.is_file() and path.name != "lock"
        )
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino)
            for path in files
        }

    before = state()
    assert loop.train(small_config(), workdir) == summary
    assert state() == before


def test_interrupted_run_goes_on_as_if_nothing_had_been(
    finished, tmp_path, monkeypatch
):
    add, wait, calls = report.Report.add, checkpoint.Checkpoints.wait, []

    def note_wait(self):
        calls.append("wait")
        wait(self)

    def interrupt(self, record):
        calls.append("add")
        add(self, record)
        if record["epoch"] == 2:  # recorded, but not yet in a checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.Report, "add", interrupt)
        patch.setattr(checkpoint.Checkpoints, "wait", note_wait)
        with pytest.raises(KeyboardInterrupt):
            loop.train(small_config(), tmp_path)
    # No record before the checkpoint of the one before is whole.
    assert calls == ["wait", "add"] * 2
    loop.train(small_config(), tmp_path)

    def without_speed(workdir):
        return [
            {k: v for k, v in record.items() if k != "images_per_second"}
            for record in records_of(workdir)
        ]

    assert without_speed(tmp_path) == without_speed(finished[0])


def test_workdir_of_another_run_is_refused(finished):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    message = "there momentum is 0.9, here 0.5"
    with pytest.raises(UserError, match=message):
        loop.train(small_config(momentum=0.5), workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_workdir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match="Cannot write to --workdir"):
        loop.train(small_config(), path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 60}, "nearest that does is 56 or 64"),
        ({"batch_size": 4}, "nearest that does is 8."),
        ({"batch_size": 512}, "batch_size=512 is more than the 256 examples"),
        ({"epochs": 0}, "epochs must be in (0, 1e6]; got 0."),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"dtype": "float16"}, "dtype='float16' is unknown"),
        ({"norm": "group"}, "norm='group' is unknown; take one of debiased, "),
        ({"mesh": "rows"}, "write the axes replica and data once each"),
        ({"mesh": "replica=3,data=2"}, "does not fit 8 devices"),
        ({"mesh": "replica=3,data"}, "does not fit 8 devices"),
        ({"norm_axes": "replica"}, "must be one of all, none, data"),
        ({"norm": "flax", "norm_axes": "none"}, "it must be 'all'"),
        (
            {"norm_options": {"normalize_over": 7}},
            "norm='jaxbn': normalize_over=7 neither divides the 8 examples of "
            "a device nor is a multiple that divides 8 devices; the nearest "
            "that works is 8.",
        ),
        (
            {"norm": "ghost", "batch_size": 40},
            "norm='ghost': normalize_over=32 neither divides the 5 examples",
        ),
        (
            {"norm_options": {"normalize_over": 3}, "microbatches": 4},
            "normalize_over=3 neither divides the 2 examples of a device nor "
            "is a multiple that divides 32 devices",
        ),
        (
            {"norm_options": {"normalize_over": 8}, "norm_axes": "none"},
            "norm_axes='none' and normalize_over=8 each say which examples",
        ),
        (
            {"norm_options": {"ddof": 2}},
            "norm_options.ddof must be in [0, 1]; got 2.",
        ),
        ({"norm_momentum": 2.0}, "momentum must be in [0, 1]; got 2.0."),
        ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1)"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is unknown"),
        ({"checkpoint_every": -1}, "checkpoint_every must be in [0, "),
        ({"microbatches": 3}, "microbatches=3 does not divide the 8 examples"),
        ({"seeds": 0}, "seeds must be in [1, 10000]; got 0."),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch must be in [1, "),
        ({"model": "resnext"}, "model='resnext' is unknown"),
    ],
)
def test_config_that_cannot_run(changes, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("over", [1, 2, 4, 16, 64])
def test_normalize_over_that_fits_the_microbatches(over):
    config = small_config(norm_options={"normalize_over": over}, microbatches=4)
    place = topology.make("data", config.batch_size, config.microbatches)
    for microbatches in (1, 4):
        norm = norm_of(config, place, microbatches=microbatches)
        assert norm().normalize_over == over


def test_diverged_run_says_so(tmp_path):
    with pytest.raises(UserError, match="Lower learning_rate, now 1e"):
        loop.train(small_config(learning_rate=1e30), tmp_path)
    assert records_of(tmp_path) == []
