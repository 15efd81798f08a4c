"""What a workdir holds already: links, results, and somebody else's lock."""

import os

import pytest

from configs import digits
from tests.test_run_files import refused
from tests.test_tools import make_run
from train import exits, files, lock, loop, seeds, trace, workdir
from train.checkpoint import Checkpoints

LINK = " is a symbolic link, and links in a workdir are not followed"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of somebody else; nothing in it changes."""
    folder = tmp_path / "elsewhere"
    (folder / "12").mkdir(parents=True)
    (folder / "12" / "mine").write_text("mine")
    yield folder
    (only,) = folder.rglob("mine")
    assert only.read_text() == "mine" and len([*folder.rglob("*")]) == 2


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/12"])
def test_checkpoints_are_not_written_through_a_link(name, run, elsewhere):
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(elsewhere / "12" if "12" in name else elsewhere)
    refused(f"{path}{LINK}", Checkpoints, run / "checkpoints")
    with Checkpoints(run / "checkpoints", read_only=True):
        pass  # whoever reads does no harm


@pytest.mark.parametrize(
    "name", ["profile", "profile/plugins", "profile/plugins/profile/now"]
)
def test_traces_are_not_written_through_a_link(name, run, elsewhere):
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(elsewhere)
    refused(f"{path}{LINK}", trace.Trace, run / "profile", print, 9)
    trace.Trace(None, print, 9)


def test_a_link_to_nothing_is_one_too(run):
    (run / "checkpoints").symlink_to("nowhere")
    refused(LINK, files.refuse_links, run / "checkpoints")
    files.refuse_links(run / "profile")


@pytest.mark.parametrize("how", [os.mkfifo, os.mkdir])
def test_details_of_an_error_go_elsewhere_if_they_must(how, run):
    how(run / "error.log")
    log = exits.ErrorLog()
    log.use(run)
    path = log.write("why")
    assert path.parent != run and path.read_text() == "why\n"
    path.unlink()


# Results without a checkpoint


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize(
    "accuracies, finished, left",
    [
        ([0.5, 0.6], False, "metrics.jsonl"),
        ([0.5], True, "summary.json"),
        ([0.5, 0.6, 0.7], True, "metrics.jsonl and summary.json"),
    ],
)
def test_no_run_begins_again_over_its_results(
    accuracies, finished, left, emptied, tmp_path
):
    run = make_run(tmp_path / "run", accuracies, finished=finished)
    if emptied:
        (run / "checkpoints").mkdir()
    elif len(accuracies) == 1:
        left = f"metrics.jsonl and {left}"
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    for _ in range(2):
        refused(f"no checkpoint, but an earlier run left {left}", restored, run)
    assert {p: p.stat().st_mtime_ns for p in run.iterdir()} == before


def restored(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.restore(None)


def test_a_crash_before_the_first_checkpoint_is_gone_on_from(tmp_path):
    """The record of an epoch is written before its checkpoint is whole."""
    run = make_run(tmp_path / "run", [0.5], finished=False)
    (run / "checkpoints").mkdir()
    assert restored(run) is None
    (run / "checkpoints").rmdir()
    refused("but an earlier run left metrics.jsonl", restored, run)


# Several seeds


@pytest.fixture
def never(monkeypatch):
    def train(*_, **__):
        raise AssertionError("it was trained")

    monkeypatch.setattr(loop, "train", train)


def two_seeds():
    config = digits.get_config()
    config.num_seeds = 2
    return config


@pytest.mark.parametrize("name", ["", "seed-0"])
def test_seeds_write_nothing_where_another_run_is_at_work(name, run, never):
    with lock.locked(run / name):
        before = sorted(run.rglob("*"))
        refused("Another run (process", seeds.train, two_seeds(), run)
    assert {*run.rglob("*")} - {*before} <= {run / "lock"}
    assert not (run / "seed-0" / "config.json").exists()


def test_seeds_keep_out_of_the_workdir_of_one(run, never):
    (run / "config.json").write_text("{}")
    refused("holds a run with a single seed", seeds.train, two_seeds(), run)


def test_one_seed_keeps_out_of_the_workdir_of_several(run):
    make_run(run / "seed-0", [0.5])
    (run / "summary.json").write_text('{"test_accuracy": 0.5, "seconds": 1}')
    one = digits.get_config()
    refused("holds a run with several seeds", workdir.open_workdir, run, one)
    assert not (run / "config.json").exists()


def test_seeds_are_not_written_through_a_link(run, elsewhere, never):
    (run / "seed-0").symlink_to(elsewhere)
    refused(f"{run / 'seed-0'}{LINK}", seeds.train, two_seeds(), run)
