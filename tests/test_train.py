"""Training steps and whole runs on a small part of the digits."""

import functools
import json

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.helpers.recipes import (
    init_state,
    make_recipe,
    mesh_of,
    small_config,
    test_program,
    train_program,
)
from train import (
    UserError,
    batching,
    checkpoint,
    data,
    files,
    loop,
    report,
    seeds,
)


@pytest.fixture(scope="module")
def images():
    return data.load_dataset("digits", train_split="train[:256]")


# Steps


def test_steps_are_the_same_on_any_number_of_devices(images, monkeypatch):
    """With GELU: at a ReLU kink a rounding difference can flip a gradient."""
    monkeypatch.setattr(nn, "relu", nn.gelu)
    recipe = make_recipe()

    def run(devices):
        mesh = mesh_of(devices)
        step = train_program(recipe, mesh)
        state = init_state(recipe, (8, 8, 1), mesh)
        start, losses = jax.device_get(state.params), []
        for epoch in range(2):
            batches = batching.train_batches(
                images.train, 64, seed=0, epoch=epoch
            )
            for batch in batches:
                state, sums = step(state, batch, epoch)
                losses.append(float(sums.loss))
                assert sums.count == 64
        return start, losses, state

    start, *want = run(1)
    chex.assert_trees_all_close(run(8), (start, *want), rtol=1e-4, atol=2e-6)
    same = jax.tree.map(
        lambda a, b: np.allclose(a, b, atol=1e-4), start, want[1].params
    )
    assert not any(jax.tree.leaves(same)), "training must move every leaf"


def test_evaluation_counts_every_image_once(images):
    recipe = make_recipe()
    mesh = mesh_of(8)
    state = init_state(recipe, (8, 8, 1), mesh)
    step = test_program(recipe, mesh)
    sums = [
        step(state.variables, batch)
        for batch in batching.test_batches(images.test, 64)
    ]
    total = jax.tree.map(lambda *a: float(sum(a)), *sums)
    inputs = (images.test.images.astype(np.float32) - 80) / 90
    logits = jax.jit(functools.partial(recipe.model.apply, train=False))(
        state.variables, inputs
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
        "training_seconds",
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

    def train(config, workdir, session, *, label, wandb=None):
        ran.append((config.seed, config.num_seeds, label, wandb))
        summary = {
            "test_accuracy": {3: 0.5, 4: 0.75, 5: 0.7}[config.seed],
            "epochs": 3,
            "steps": 12,
            "seconds": 1.0,
        }
        files.write_json(workdir / "summary.json", summary)
        return summary

    monkeypatch.setattr(loop, "train", train)
    got = seeds.train(
        small_config(seed=3, num_seeds=2), tmp_path, wandb="norms"
    )
    assert ran == [(3, 1, "seed 1/2", "norms"), (4, 1, "seed 2/2", "norms")]
    assert got["test_accuracy_of_seeds"] == [0.5, 0.75]
    assert got["test_accuracy"] == 0.625
    np.testing.assert_allclose(got["test_accuracy_deviation"], 0.125 * 2**0.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == got
    seeds.train(small_config(seed=3, num_seeds=3), tmp_path)
    assert ran[2:] == [(5, 1, "seed 3/3", None)], (
        "what is finished is not run again"
    )
    with pytest.raises(UserError, match="with momentum=0.9 instead of 0.5"):
        seeds.train(small_config(seed=3, num_seeds=3, momentum=0.5), tmp_path)


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
    message = "with momentum=0.9 instead of 0.5"
    with pytest.raises(UserError, match=message):
        loop.train(small_config(momentum=0.5), workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_workdir_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match="Cannot write to --workdir"):
        loop.train(small_config(), path)


def test_diverged_run_says_so(tmp_path):
    with pytest.raises(UserError, match="Lower learning_rate, now 1e"):
        loop.train(small_config(learning_rate=1e30), tmp_path)
    assert records_of(tmp_path) == []
