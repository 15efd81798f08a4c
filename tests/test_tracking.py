"""Curves, TensorBoard events and Weights & Biases of a run."""

import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.helpers.made_runs import open_report
from tests.helpers.recipes import small_config
from tests.helpers.runs import end, one_line, start
from train import (
    UserError,
    epoch,
    events,
    learning_curves,
    loop,
    report,
    wandb_run,
)
from train.meter import MAX_IN_FLIGHT, Meter
from train.state import Sums


def record_of(number, step, **changes):
    record = {"epoch": number, "step": step, "train_loss": 1.0}
    record |= {"train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.5}
    return {**record, "images_per_second": 1.0, **changes}


def sums_of(loss, count=2):
    return Sums(np.float32(loss * count), 0.0, np.float32(count), 0.0, 0.0)


def events_of(folder):
    """What TensorBoard reads: (tag, step, value) of all files of a folder.

    As in its event_accumulator: the files in the order of their names; from a
    SessionLog START on, earlier events of that step and later are dropped.
    """
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[1] < event.step]
            for value in event.summary.value:
                found.append((value.tag, event.step, value.simple_value))
    return found


# The picture


@pytest.mark.parametrize("epochs", [1, 3, 40])
def test_curves_of_a_run(epochs):
    records = [
        record_of(n, 4 * n, train_loss=1 / n, test_accuracy=n / 50)
        for n in range(1, epochs + 1)
    ]
    figure, axis = learning_curves.plt.subplots()
    learning_curves._run_curves(axis, records, "loss", 1, "{:.4f}")
    np.testing.assert_allclose(
        axis.lines[0].get_ydata(), 1 / np.arange(1, epochs + 1)
    )
    ticks = axis.get_xticks()
    assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == [f"train, last {1 / epochs:.4f}", "test, last 1.0000"]
    learning_curves.plt.close(figure)


def test_picture_has_a_title(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        learning_curves.plt.Figure,
        "suptitle",
        lambda self, title: titles.append(title),
    )
    with open_report(tmp_path, title="ResNet-8 on digits") as made:
        made.add(record_of(1, 4))
    assert titles == ["ResNet-8 on digits"]
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


# Steps


def test_meter_hands_on_what_it_fetches_in_order():
    seen = []
    meter = Meter(step=6, fetched=lambda step, sums: seen.append((step, sums)))
    for i in range(MAX_IN_FLIGHT):
        meter.add(Sums(*jnp.array([i, 0, 1, 0, 0.0])), 2)
    assert seen == []  # nothing is waited for
    meter.add(Sums(*jnp.array([99, 0, 1, 0, 0.0])), 3)
    assert [step for step, _ in seen] == [8]
    assert meter.sums()[0] == sum(range(MAX_IN_FLIGHT)) + 99
    assert [step for step, _ in seen] == [*range(8, 23, 2), 25]
    assert [float(sums.loss) for _, sums in seen] == [*range(8), 99]


def test_loss_of_every_tenth_step(tmp_path):
    with open_report(tmp_path) as made:
        for step in range(1, 36):
            made.step(step, sums_of(step, count=0 if step == 30 else 2))
        for step in (48, 56, 64):  # several steps in one dispatch
            made.step(step, sums_of(step))
    assert events_of(tmp_path) == [
        ("train/step_loss", step, step) for step in (10, 20, 31, 48, 56, 64)
    ]


def test_full_disk_in_a_step_is_an_error_of_the_epoch(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    full = lambda _: open("/dev/full", "wb")  # noqa: E731, SIM115
    monkeypatch.setattr(record_writer, "open_file", full)
    monkeypatch.setattr(events, "FLUSH", -1.0)
    with (
        pytest.raises(OSError, match="No space left"),
        open_report(tmp_path) as made,
    ):
        made.step(10, sums_of(1.0))
        made.step(20, sums_of(1.0))
        monkeypatch.setattr(events.Events, "write", None)
        made.add(record_of(1, 20))


def test_resumed_report_has_no_point_twice(tmp_path, monkeypatch):
    times = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr("time.time", lambda: next(times))
    with open_report(tmp_path) as made:
        for step in (10, 20, 30):
            made.step(step, sums_of(1.0))
        made.add(record_of(1, 32))
        for step in (40, 50, 60):
            made.step(step, sums_of(2.0))
        made.add(record_of(2, 64))
    with open_report(tmp_path, done=1, step=48) as made:
        assert [one["epoch"] for one in made.records] == [1]
        for step in range(49, 65):
            made.step(step, sums_of(3.0))
        made.add(record_of(2, 64))
    found = events_of(tmp_path)
    assert len({(tag, step) for tag, step, _ in found}) == len(found)
    losses = [one[1:] for one in found if one[0] == "train/step_loss"]
    assert losses == [(10, 1), (20, 1), (30, 1), (40, 2), (50, 3), (60, 3)]
    accuracies = [step for tag, step, _ in found if tag == "test_accuracy"]
    assert accuracies == [32, 64]


@pytest.mark.slow  # for reports the next one shows the same
def test_resumed_run_has_no_point_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "STEPS", 2)
    config = small_config(checkpoint_every=3)  # epochs of 4 steps
    loop.train(config, tmp_path / "whole")
    test, calls = epoch.EpochRunner.test, []

    def crashes(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("crashed")
        return test(*arguments)

    monkeypatch.setattr(epoch.EpochRunner, "test", crashes)
    with pytest.raises(RuntimeError, match="crashed"):
        loop.train(config, tmp_path / "resumed")
    seen = events_of(tmp_path / "resumed")
    assert ("train/step_loss", 8) in [one[:2] for one in seen]
    loop.train(config, tmp_path / "resumed")
    whole, resumed = (
        [
            one
            for one in events_of(tmp_path / name)
            if one[0] != "images_per_second"
        ]
        for name in ("whole", "resumed")
    )
    assert resumed == whole
    steps = [step for tag, step, _ in whole if tag == "train/step_loss"]
    assert steps == [2, 4, 6, 8, 10, 12]


# Weights & Biases


class FakeWandb(types.ModuleType):
    """Keeps the runs that are started, and what is logged to them."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **given):
        run = types.SimpleNamespace(given=given, logged=[], ended=None)
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_continues_the_run_of_a_resumed_one(tmp_path, wandb):
    (tmp_path / "config.json").write_text('{"depth": 8}')
    with open_report(tmp_path) as made:  # without
        made.add(record_of(1, 4))
    with open_report(tmp_path, wandb="norms", done=1, step=4) as made:
        made.step(10, sums_of(1.0))
        made.add(record_of(2, 8))
        made.add(record_of(3, 12))  # not in a checkpoint yet when it crashes
    with (
        pytest.raises(UserError, match="crashed"),
        open_report(tmp_path, wandb="norms", done=2, step=8) as made,
    ):
        made.add(record_of(3, 12))
        made.add(record_of(4, 16, test_accuracy=0.75))
        raise UserError("crashed")
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"]
    assert first.given["resume"] == second.given["resume"] == "allow"
    assert first.given["project"] == "norms"
    assert first.given["config"] == {"depth": 8}
    assert first.given["name"] == tmp_path.name
    assert [step for step, _ in first.logged] == [4, 8, 12]
    assert [step for step, _ in second.logged] == [16]
    want = record_of(4, 16, test_accuracy=0.75)
    del want["step"]
    assert second.logged == [(16, want)]
    assert (first.ended, second.ended) == (0, 1)
    with open_report(tmp_path, wandb="another", done=2, step=8):
        pass
    assert wandb.runs[2].given["id"] != first.given["id"]
    assert [step for step, _ in wandb.runs[2].logged] == [4, 8]


def test_wandb_that_cannot_finish_is_a_warning(tmp_path, wandb):
    def fails(**_):
        raise RuntimeError("no network")

    with (
        pytest.warns(UserWarning, match="--wandb: no network"),
        open_report(tmp_path, wandb="norms") as made,
    ):
        wandb.runs[0].finish = fails
        made.add(record_of(1, 4))
    assert (tmp_path / "metrics.jsonl").read_text()


def test_wandb_groups_seeds(tmp_path, wandb):
    run = tmp_path / "five" / "seed-3"
    run.mkdir(parents=True)
    with open_report(run, wandb="norms", label="seed 3/5"):
        pass
    (made,) = wandb.runs
    assert made.given["group"] == "five" and made.given["name"] == "five-seed-3"


def test_wandb_that_cannot_start(tmp_path, wandb, monkeypatch):
    def refuses(**_):
        raise RuntimeError("api_key not configured\n(no-tty).")

    monkeypatch.setattr(wandb, "init", refuses)
    message = r"--wandb=norms: api_key not configured \(no-tty\)\. WANDB_MODE="
    with pytest.raises(UserError, match=message):
        open_report(tmp_path, wandb="norms")
    (tmp_path / "wandb.json").write_text('{"project": "norms", "id": 5}')
    with pytest.raises(UserError, match="is damaged: id is 5. Remove it to"):
        open_report(tmp_path, wandb="norms")
    (tmp_path / "wandb.json").unlink()
    (tmp_path / "wandb").symlink_to(tmp_path)
    with pytest.raises(UserError, match="wandb is a symbolic link, and"):
        open_report(tmp_path, wandb="norms")


def test_without_the_package_it_is_one_line(tmp_path):
    missing = "import sys; sys.modules['wandb'] = None"
    code, out, error = end(
        start(tmp_path / "run", "--wandb=norms", patch=missing)
    )
    assert code == 1 and out == ""
    assert one_line(error).startswith("--wandb needs the package wandb (")
    assert one_line(error).endswith("pip install wandb")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(UserError, match="needs the package wandb: pip install"):
        wandb_run.require()
