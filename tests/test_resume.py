"""Runs that are interrupted after any dispatch end as if they had not been."""

import re

import chex
import jax
import pytest

from tests.helpers import tiny_network
from tests.helpers.recipes import small_config
from tests.helpers.runs import strict_json
from train import (
    Stopped,
    compare,
    events,
    load,
    loop,
    networks,
    report,
    signals,
)
from train.session import make_session
from train.summary import result
from train.workdir import read_records

# Four steps an epoch: a dispatch of three, and one of the rest. The last epoch
# has two steps. Epochs 2 and 4 are tested.
CONFIG = {
    "epochs": 3.5,
    "test_every": 2,
    "steps_per_dispatch": 3,
    "lookahead_every": 3,
}
DISPATCHES = 7


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def made(request, tmp_path_factory):
    """Config, session and workdir of a run, and its summary."""
    config = small_config(
        data_on_device=request.param, checkpoint_every=3, **CONFIG
    )
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "make", tiny_network.make)
        session = make_session(config)
        yield config, session, workdir, loop.train(config, workdir, session)


def records_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [strict_json(line) for line in lines]
    for record in records:
        record.pop("images_per_second", None)
    return records


def assert_same(workdir, whole):
    assert records_of(workdir) == records_of(whole)
    got, want = load.load(workdir), load.load(whole)
    assert got.step == want.step == 14
    chex.assert_trees_all_equal(
        jax.device_get(got.variables), jax.device_get(want.variables)
    )


def test_only_some_epochs_are_tested(made):
    records = records_of(made[2])
    assert [record["epoch"] for record in records] == [2, 4]
    assert [record["step"] for record in records] == [8, 14]
    assert made[3]["test_loss"] == records[-1]["test_loss"]


def train_with_stops(config, workdir, session, monkeypatch):
    """Stops after each dispatch, then trains to the end."""
    with monkeypatch.context() as patch:
        patch.setattr(signals.Interrupt, "requested", True)
        for _ in range(DISPATCHES):
            with pytest.raises(Stopped):
                loop.train(config, workdir, session)
    loop.train(config, workdir, session)


def test_stopped_after_each_dispatch(made, tmp_path, monkeypatch):
    config, session, whole, _ = made
    train_with_stops(config, tmp_path, session, monkeypatch)
    assert_same(tmp_path, whole)
    # Also the best one, which was saved before it was tested.
    records = records_of(whole)
    best = max(records, key=lambda one: (one["test_accuracy"], one["step"]))
    assert load.load(tmp_path, best=True).step == best["step"]


def test_no_duration_or_speed_that_was_not_measured(
    made, tmp_path, monkeypatch, capsys
):
    """Stopped after each dispatch, so also at the end of each tested epoch."""
    config, session, _, whole = made
    absent = {"seconds", "training_seconds", "images_per_second"}
    assert absent <= {*whole}
    tags, write = set(), events.Events.write

    def note(self, step, scalars):
        tags.update(scalars)
        write(self, step, scalars)

    monkeypatch.setattr(events.Events, "write", note)
    with monkeypatch.context() as patch:
        patch.setattr(signals.Interrupt, "requested", True)
        for _ in range(DISPATCHES):
            with pytest.raises(Stopped):
                loop.train(config, tmp_path, session)
    summary = loop.train(config, tmp_path, session)
    assert {*whole} - {*summary} == absent
    assert result(summary).endswith(" after 4 epochs (14 steps)")
    assert "test_loss" in tags and "images_per_second" not in tags
    for record in read_records(tmp_path):
        assert "images_per_second" not in record
    assert "images/s" not in capsys.readouterr().out
    compare.compare([tmp_path], tmp_path / "compare.png")
    values = {}
    for part in capsys.readouterr().out.strip().split("\n\n"):
        head, row = (re.split("  +", line) for line in part.splitlines())
        values |= dict(zip(head, row))
    assert values["images/s"] == values["seconds"] == "-"


def test_skipped_batches_are_counted_once(tmp_path, monkeypatch):
    """The first update overflows, so all batches but the first are skipped."""
    changes = {"on_nonfinite": "skip", "learning_rate": 1e30}
    config = small_config(**CONFIG, **changes)
    monkeypatch.setattr(networks, "make", tiny_network.make)
    session = make_session(config)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.train(config, whole, session)
    train_with_stops(config, stopped, session, monkeypatch)
    records = records_of(whole)
    assert [record["skipped"] for record in records] == [7, 6]
    assert [record["train_loss"] is None for record in records] == [True] * 2
    assert records_of(stopped) == records


def test_a_trace_of_a_short_run(made, tmp_path):
    config, session, *_ = made
    config = config.copy_and_resolve_references().unlock()
    config.profile = True
    loop.train(config, tmp_path, session)
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]


def test_killed_after_every_third_dispatch(made, tmp_path, monkeypatch):
    """What was not in a checkpoint is done again."""
    config, session, whole, _ = made
    advance, dispatches = report.Report.advance, []

    def killed(self, images):
        advance(self, images)
        dispatches.append(images // config.batch_size)
        if len(dispatches) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.Report, "advance", killed)
    kills = 0
    while not (tmp_path / "summary.json").exists():
        dispatches.clear()
        try:
            loop.train(config, tmp_path, session)
        except KeyboardInterrupt:
            kills += 1
    assert kills > 2
    assert_same(tmp_path, whole)


def test_a_resumed_run_compiles_only_what_is_left(made):
    """From the last epoch on, which is a single dispatch of two steps."""
    _, session, _, _ = made
    programs = type(session.programs)(session.experiment, session.pipeline)
    assert programs.compile(3, 0) and not programs.compile(3, 0)
    programs.warm_up(3, 0)
    assert programs.compile(2, 0)  # dispatches of three steps, and of one
