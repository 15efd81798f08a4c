"""What a run reports of its epochs and steps."""

import itertools
import json
import time
import types

import pytest

from tests.helpers import tiny_network
from tests.helpers.made_runs import open_report
from tests.helpers.recipes import small_config
from train import loop, networks, output, report, seeds, summary
from train.duration import Steps
from train.meter import MAX_IN_FLIGHT
from train.workdir import median_speed, read_records

RECORD = {
    **{"epoch": 164, "step": 640, "learning_rate": 0.1, "skipped": 0},
    **{"train_loss": 2.2733, "train_accuracy": 0.179, "test_loss": 1.7606},
    **{"test_accuracy": 0.5556, "images_per_second": 5304.2},
}


def test_an_epoch_fits_a_line(tmp_path, capsys):
    with open_report(tmp_path, epochs=200, label="seed 3/5") as made:
        made.add(RECORD)
    assert capsys.readouterr().out == (
        "seed 3/5 epoch 164/200  train 2.2733 17.90%  test 1.7606 55.56%  "
        "5,304 images/s\n"
    )


def test_a_speed_that_was_not_measured_is_not_printed(tmp_path, capsys):
    record = {k: v for k, v in RECORD.items() if k != "images_per_second"}
    with open_report(tmp_path, epochs=200) as made:
        made.add(record)
        assert read_records(tmp_path) == [record]
    assert capsys.readouterr().out == (
        "epoch 164/200  train 2.2733 17.90%  test 1.7606 55.56%\n"
    )


def test_median_of_the_speeds_that_were_measured():
    speeds = [{"images_per_second": speed} for speed in (1.0, 5.0, 2.0)]
    assert median_speed([{}, *speeds, {}]) == {"images_per_second": 2.0}
    assert median_speed([{}]) == {}


def test_lines_are_wrapped_between_words(capsys):
    path = "/" + "x" * 90
    output.say(f"results of all of the seeds that were trained are in {path}")
    output.say("  " + "word " * 16 + "end")
    output.say("- " + "a-b " * 25 + "\nshort")
    assert capsys.readouterr().out.splitlines() == [
        "results of all of the seeds that were trained are in",
        "  " + path,
        ("  " + "word " * 15).rstrip(),
        "    word end",
        ("- " + "a-b " * 19).rstrip(),
        ("  " + "a-b " * 6).rstrip(),
        "short",
    ]


def test_every_line_names_its_seed(tmp_path, capsys):
    seeds.train(small_config(epochs=1, num_seeds=2, seed=5), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    begun = [line for line in lines if not line.startswith("  ")]
    assert all(len(line) <= 80 for line in lines)
    for i in (1, 2):
        name = f"seed {i}/2 "
        mine = [
            line.removeprefix(name) for line in begun if line.startswith(name)
        ]
        assert mine[0].startswith("ResNet-8 ")
        assert mine[-2].startswith("epoch 1/1  train ")
        begun = begun[len(mine) :]
    assert not begun


def test_speed_leaves_compilation_out(tmp_path, monkeypatch):
    prepare = loop.prepare

    def slow_to_compile(*arguments, **options):
        time.sleep(3)
        prepare(*arguments, **options)

    monkeypatch.setattr(loop, "prepare", slow_to_compile)
    loop.train(small_config(epochs=1), tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 256 / json.loads(line)["images_per_second"] < 3


@pytest.mark.parametrize("size", [1, 48])
def test_remaining_time_of_dispatches_of_several_steps(size, monkeypatch):
    """Ten seconds a step, 1000 steps, of which 13 dispatches are done."""
    now, said = itertools.count(0, 10 * size), []
    monkeypatch.setattr(summary.time, "monotonic", lambda: next(now))
    told = types.SimpleNamespace(say=said.append)
    remaining = summary.RemainingTime(told, Steps(per_epoch=100, total=1000))
    for dispatch in range(1, 14):
        # The clock is read twice, ten dispatches apart.
        if 4 <= dispatch <= 12:
            next(now)
        remaining.step(dispatch * size)
    (line,) = said
    minutes = 10 * (1000 - 13 * size) / 60
    assert line.startswith(f"about {minutes:.0f} min left, until ")


def test_remaining_time_counts_steps_that_are_completed(tmp_path, monkeypatch):
    """Not those that are dispatched, which may be MAX_IN_FLIGHT more."""
    dispatched, ahead = [], []

    def advance(self, images):
        dispatched.append(images)

    def step(self, done):
        ahead.append(len(dispatched) + 1 - done)

    monkeypatch.setattr(report.Report, "advance", advance)
    monkeypatch.setattr(summary.RemainingTime, "step", step)
    monkeypatch.setattr(networks, "make", tiny_network.make)
    loop.train(small_config(epochs=1, batch_size=16), tmp_path)
    assert len(ahead) == 16
    # One is read after each dispatch above the limit, the others at the end.
    assert ahead[: 16 - MAX_IN_FLIGHT] == [MAX_IN_FLIGHT] * (16 - MAX_IN_FLIGHT)
