"""What is done with runs once they are there: evaluate and compare."""

import json
import os
import pathlib
import re
import shutil
import statistics

import jax
import numpy as np
import pytest

from configs import digits
from tests.helpers import numpy_networks
from tests.helpers.made_runs import make_run
from train import (
    UserError,
    compare,
    confusion,
    data,
    evaluate,
    learning_curves,
    trained_run,
    weight_average,
)
from train.checkpoint import Checkpoints, Progress
from train.experiment import build_experiment
from train.state import abstract_state
from train.workdir import open_workdir

# Evaluate

IMAGES, STEPS, EVERY = 256, 4, 64


def small_config(**changes):
    config = digits.get_config()
    config.update(
        width=4,
        epochs=3,
        batch_size=EVERY,
        train_split=f"train[:{IMAGES}]",
        test_split="test[:100]",
        crop_padding=0,  # so that numpy sees the images of training
    )
    config.update(changes)
    return config.lock()


class Made:
    """A run by hand: three checkpoints with weights drawn by numpy."""

    def __init__(self, workdir):
        config = small_config()
        experiment = build_experiment(config)
        open_workdir(workdir, config)
        shape = experiment.dataset.train.images.shape[1:]
        blank = abstract_state(experiment.recipe, shape, experiment.topology)
        self.workdir, self.variables = workdir, {}
        # The best; the second epoch; and one within the third, without a test.
        made = [(4, 1, 0, 0.5), (8, 2, 0, 0.25), (10, 2, 2, None)]
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            for step, epoch, batch, accuracy in made:
                rng = np.random.default_rng(step)
                own = {
                    "params": numpy_networks.randomized(blank.params, rng),
                    "batch_stats": numpy_networks.randomized(
                        blank.batch_stats, rng
                    ),
                }
                self.variables[step] = own
                state = jax.tree.map(lambda leaf: np.zeros(leaf.shape), blank)
                state = state._replace(step=np.int32(step), **own)
                state = jax.tree.map(
                    lambda leaf, like: np.asarray(leaf, like.dtype),
                    state,
                    blank,
                )
                state = jax.device_put(state, experiment.topology.replicated)
                checkpoints.save(
                    state,
                    Progress(epoch, batch),
                    test_accuracy=accuracy,
                )
        self.saved = trained_run.TrainedRun(
            config, experiment, state, Progress(epoch, batch)
        )
        self.inputs = experiment.recipe.pixel_mean, experiment.recipe.pixel_std

    def logits(self, step, images):
        """In float64, by the equations of the network."""
        mean, std = self.inputs
        own = self.variables[step]
        layers = numpy_networks.Layers(own["params"], own["batch_stats"])
        return numpy_networks.resnet(layers, (images - np.array(mean)) / std)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


def check(found, logits, labels):
    """Compares with sums over the examples, one by one."""
    answers = logits.argmax(1)
    losses = np.log(np.exp(logits).sum(1)) - logits[range(len(labels)), labels]
    want = np.zeros((10, 10), int)
    for label, answer in zip(labels, answers):
        want[label, answer] += 1
    np.testing.assert_array_equal(found["confusion"], want)
    assert found["images"] == len(labels)
    assert found["accuracy"] == (answers == labels).mean()
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-4)
    for k, one in enumerate(found["classes"]):
        own = labels == k
        assert one["images"] == own.sum()
        if not own.any():
            assert set(one) == {"images"}
            continue
        assert one["accuracy"] == (answers[own] == k).mean()
        np.testing.assert_allclose(one["loss"], losses[own].mean(), rtol=1e-4)


def test_evaluation_is_that_of_the_equations(made, monkeypatch, capsys):
    monkeypatch.setattr(confusion, "_BATCH", 32)  # the last one is padded
    before = sorted((made.workdir / "checkpoints").rglob("*"))
    found = evaluate.evaluate(made.workdir, made.saved, precise=3)
    split = made.saved.experiment.dataset.test
    check(found, made.logits(10, split.images), split.labels)
    assert (found["step"], found["epoch"]) == (10, 2)
    assert found["split"] == "test[:100]"
    written = (made.workdir / "evaluation.json").read_text()
    assert json.loads(written) == found
    assert sorted((made.workdir / "checkpoints").rglob("*")) == before

    again = found["precise"]
    assert again["batches"] == 3 and again["images"] == 100
    assert again["loss"] != pytest.approx(found["loss"], rel=0.01)
    out = capsys.readouterr().out
    assert "digits test[:100], 100 images, at step 10 (epoch 2):" in out
    for one, more in ((found, ""), (again, "  with statistics recomputed")):
        line = f"accuracy {one['accuracy']:.2%}  loss {one['loss']:.4f}{more}"
        assert line in out
    for k, (one, other) in enumerate(zip(found["classes"], again["classes"])):
        line = f"{k:>5} {one['images']:>7} {one['accuracy']:>9.2%} "
        line += f"{one['loss']:>8.4f} {other['accuracy']:>9.2%}"
        if one["images"]:
            assert line in out
    row = found["confusion"][0][1:]
    assert f"  {1 + int(np.argmax(row))} ({max(row)})" in out


def test_new_statistics_are_those_of_so_many_training_batches(made):
    run = made.saved
    stats = weight_average.precise_statistics(
        run.config,
        run.experiment,
        run.state.variables,
        batches=3,
    )
    images = run.experiment.dataset.train.images
    # Of the last epoch, that the config asks for.
    places = data.order(IMAGES, seed=0, epoch=2)[: 3 * EVERY]
    mean, std = made.inputs
    x = (images[places] - np.array(mean)) / std
    kernel = made.variables[10]["params"]["Conv_0"]["kernel"]
    y = numpy_networks.conv(x, kernel)
    layer = stats["BatchNorm_0"]
    np.testing.assert_allclose(layer["mean"], y.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(layer["var"], y.var((0, 1, 2)), rtol=1e-4)


def test_best_checkpoint_and_another_split(made):
    best = trained_run.load_run(made.workdir, best=True)
    found = evaluate.evaluate(made.workdir, best, split="train[300:340]")
    assert (found["step"], found["epoch"]) == (4, 1)
    assert "precise" not in found
    split = data.load_dataset("digits", test_split="train[300:340]").test
    check(found, made.logits(4, split.images), split.labels)
    # Those of the run are not read again.
    for name in ("train", "test"):
        own = getattr(made.saved.experiment.dataset, name)
        expression = made.saved.config[f"{name}_split"]
        assert evaluate._examples(made.saved, expression) is own


def test_no_more_batches_than_an_epoch_has(made, monkeypatch):
    asked = []

    def anew(config, experiment, variables, *, batches):
        asked.append(batches)
        return variables["batch_stats"]

    monkeypatch.setattr(evaluate, "precise_statistics", anew)
    found = evaluate.evaluate(made.workdir, made.saved, precise=99)
    assert asked == [STEPS] and found["precise"]["batches"] == STEPS


def test_what_cannot_be_evaluated(made, tmp_path):
    run = made.workdir, made.saved
    with pytest.raises(UserError, match="is not a run.*Use the --workdir"):
        evaluate.main([str(tmp_path)])
    with pytest.raises(UserError, match="--precise must be at least 1; got -1"):
        evaluate.main([str(made.workdir), "--precise=-1"])
    with pytest.raises(UserError, match="Split 'validation' selects nothing"):
        evaluate.evaluate(*run, split="validation")
    config = small_config(norm="flax")
    other = made.saved._replace(config=config)
    with pytest.raises(UserError, match="norm='flax' does not support"):
        evaluate.evaluate(made.workdir, other, precise=3)
    open_workdir(tmp_path, made.saved.config)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(made.saved.state, made.saved.progress)
    with pytest.raises(UserError, match="has no checkpoint with a test yet"):
        trained_run.load_run(tmp_path, best=True)


def test_reading_a_run_leaves_a_damaged_checkpoint_where_it_is(made, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(made.workdir, workdir)
    newest = workdir / "checkpoints" / "10"
    for path in newest.rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    unfinished = workdir / "checkpoints" / "12.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with pytest.warns(UserWarning, match="step 10 is damaged"):
        found = trained_run.load_run(workdir)
    assert int(found.state.step) == 8 and found.progress.epoch == 2
    assert newest.is_dir() and unfinished.is_dir()
    assert not [*workdir.glob("damaged*")]


def rows_of(out):
    """The rows of a table whose columns may be cut into several parts."""
    parts = [
        [re.split(r" {2,}", line) for line in part.splitlines()]
        for part in out.rstrip().split("\n\n")
    ]
    assert all(len(line) <= 80 for line in out.splitlines())
    return [
        [*rows[0], *(cell for row in rows[1:] for cell in row[1:])]
        for rows in zip(*parts)
    ]


def test_table_of_runs(tmp_path, capsys):
    last = [0.9, 0.92, 0.97]
    runs = [
        make_run(tmp_path / f"a{i}", [0.5, 0.8, accuracy], seed=i)
        for i, accuracy in enumerate(last)
    ]
    other = make_run(tmp_path / "b", [0.4, 0.6, 0.7], norm="flax")
    begun = make_run(
        tmp_path / "c", [0.5, 0.75], finished=False, data_dir="/elsewhere"
    )
    out = tmp_path / "picture.png"
    groups, differ = compare.compare([*runs, other, begun], out)
    assert differ == ["norm"]
    assert [len(group.runs) for group in groups] == [3, 1, 1]
    head, *rows = rows_of(capsys.readouterr().out)
    want = "run,norm,seeds,epochs,accuracy %,loss,images/s,seconds,devices"
    assert head == want.split(",")
    mean = statistics.fmean(last)
    deviation = np.std(last, ddof=1)
    assert rows == [
        [
            *("a0 + 2", "jaxbn", "0,1,2", "3/3"),
            f"{100 * mean:.2f} ± {100 * deviation:.2f}",
            f"{1 - mean:.4f} ± {deviation:.4f}",
            *("100 ± 0", "21 ± 1", "4 cpu"),
        ],
        ["b", "flax", "0", "3/3", "70.00", "0.3000", "100", "20", "4 cpu"],
        ["c", "jaxbn", "0", "2/3", "75.00", "0.2500", "100", "-", "?"],
    ]
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(out.read_bytes()) > 10_000
    assert [group.label for group in groups] == [
        "norm=jaxbn, 3 runs",
        "norm=flax",
        "norm=jaxbn (2 of 3 epochs)",
    ]


def test_curves_are_means_in_a_band(tmp_path):
    runs = [
        make_run(tmp_path / str(i), accuracies, seed=i)
        for i, accuracies in enumerate([[0.5, 0.8, 0.9], [0.7, 0.8, 1.0]])
    ]
    groups, _ = compare.group_runs([compare.read_run(run) for run in runs])
    figure, axes = learning_curves.plt.subplots()
    learning_curves._curve(axes, groups[0], "test_accuracy", 100, "C0", "-")
    (line,), (band,) = axes.lines, axes.collections
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [60, 80, 95])
    points = band.get_paths()[0].vertices
    at_first = points[points[:, 0] == 1][:, 1]
    spread = np.std([50, 70], ddof=1)
    np.testing.assert_allclose(
        [at_first.min(), at_first.max()], [60 - spread, 60 + spread]
    )
    learning_curves.plt.close(figure)


def test_fields_within_a_field_and_averages(tmp_path, capsys):
    runs = []
    for name, over in (("a", 32), ("b", 64)):
        options = {"normalize_over": over}
        run = make_run(tmp_path / name, [0.5] * 3, norm_options=options)
        runs.append(run)
    path = runs[0] / "summary.json"
    summary = {"average_test_accuracy": 0.625, **json.loads(path.read_text())}
    path.write_text(json.dumps(summary))
    groups, differ = compare.compare(runs, tmp_path / "out.png")
    assert differ == ["norm_options.normalize_over"]
    head, first, second = rows_of(capsys.readouterr().out)
    place = head.index("average's %")
    assert (first[1], first[place]) == ("32", "62.50")
    assert (second[1], second[place]) == ("64", "-")


def test_folder_of_seeds_is_its_runs(tmp_path, capsys):
    for seed in (2, 10):
        make_run(tmp_path / "all" / f"seed-{seed}", [0.5] * 3, seed=seed)
    groups, _ = compare.compare([tmp_path / "all"], tmp_path / "out.svg")
    names = [run.path.name for run in groups[0].runs]
    assert names == ["seed-2", "seed-10"]
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")


def test_a_run_of_before_takes_the_defaults(tmp_path):
    """A field that came later is no difference while it has its default."""
    old, new = (make_run(tmp_path / name, [0.5] * 3) for name in "ab")
    path = old / "config.json"
    config = json.loads(path.read_text())
    del config["zero_init_gamma"]
    path.write_text(json.dumps(config))
    _, differ = compare.group_runs(
        [compare.read_run(old), compare.read_run(new)]
    )
    assert differ == []


def test_what_cannot_be_compared(tmp_path):
    run = make_run(tmp_path / "a", [0.5] * 3)
    out = tmp_path / "out.png"

    def refused(message, *paths, out=out):
        with pytest.raises(UserError, match=re.escape(message)):
            compare.compare(paths, out)

    refused(f"{tmp_path} is not a run", run, tmp_path)
    refused("/b/../a is given twice", run, tmp_path / "b" / ".." / "a")
    refused("Cannot write to --out=", run, out=tmp_path / "no" / "out.png")
    refused("Cannot plot --out=", run, out=tmp_path / "out.doc")
    (run / "metrics.jsonl").write_text('{"epoch": 1')
    refused("metrics.jsonl, line 1, is damaged: Expecting", run)
    (run / "metrics.jsonl").unlink()
    refused("metrics.jsonl lacks epochs 1 to 3. Restore it", run)
    (run / "summary.json").unlink()
    refused(f"{run} has no records yet; they are written after", run)
    (run / "config.json").write_text("{")
    refused("config.json is damaged", run)
    assert not out.exists()


def test_command(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, [0.5] * 3) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    compare.main([str(run) for run in runs])
    assert pathlib.Path("compare.png").exists()
    assert capsys.readouterr().out.endswith("Wrote compare.png.\n")
