"""Files of a workdir: damaged, foreign, linked, and places that take none."""

import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX import record_writer

from configs import digits
from tests.helpers import tiny_network
from tests.helpers.made_runs import make_run, open_report
from tests.helpers.recipes import small_config
from tests.helpers.runs import strict_json
from train import (
    UserError,
    cifar,
    cli,
    compare,
    data,
    evaluate,
    files,
    loop,
    networks,
    seeds,
    trained_run,
    workdir,
)
from train.experiment import build_experiment

ROOT = pathlib.Path(__file__).resolve().parent.parent


def refused(message, call, *arguments, **options):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


# Writing


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "summary.json"
    path.symlink_to(victim)
    (tmp_path / "summary.json.partial").symlink_to(victim)
    files.write_json(path, {"a": 1})
    assert victim.read_text() == "mine"
    assert not path.is_symlink() and json.loads(path.read_text()) == {"a": 1}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_what_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as file:
        file.write(b"new")
        _ = 1 / 0
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    seen = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        kind = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append("folder" if kind else "file")
        sync(descriptor)

    def note_replace(*names):
        seen.append("name")
        replace(*names)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    files.write_text(tmp_path / "file", "text")
    assert seen == ["file", "name", "folder"]


# NaN and Infinity, which JSON does not have


def test_numbers_that_are_not_finite_are_null():
    value = {"a": [float("nan"), 1.5], "b": {"c": (float("inf"), None)}}
    text = files.to_json(value | {"d": -float("inf")})
    assert text == '{"a": [null, 1.5], "b": {"c": [null, null]}, "d": null}'


def test_all_files_of_a_diverged_run_are_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "make", tiny_network.make)
    options = {"learning_rate": 1e30, "on_nonfinite": "ignore", "num_seeds": 2}
    config = small_config(epochs=2, checkpoint_every=3, **options)
    seeds.train(config, tmp_path)
    run = tmp_path / "seed-1"
    evaluate.evaluate(run, trained_run.load_run(run))

    def check():
        texts = (run / "metrics.jsonl").read_text().splitlines()
        records = [strict_json(text) for text in texts]
        assert [one["test_loss"] for one in records] == [None, None]
        found = {*tmp_path.rglob("*.json")}
        found |= {*tmp_path.rglob("progress/metadata")}
        read = {path: strict_json(path.read_text()) for path in found}
        assert read[run / "summary.json"]["test_loss"] is None
        assert read[run / "evaluation.json"]["loss"] is None
        return read

    read = check()
    inside = read[run / "checkpoints" / "6" / "progress" / "metadata"]
    assert inside["batch"] == 2 and None in inside["sums"]
    # It resumes from that checkpoint, within the second epoch.
    shutil.rmtree(run / "checkpoints" / "8")
    (run / "summary.json").unlink()
    one = config.copy_and_resolve_references()
    one.update(seed=1, num_seeds=1)
    summary = loop.train(one, run)
    check()
    # All readers have NaN again.
    assert np.isnan(summary["test_loss"])
    for found in (workdir.read_summary(run), *workdir.read_records(run)):
        assert np.isnan(found["test_loss"]) and found["test_accuracy"] >= 0
    capsys.readouterr()
    compare.compare([tmp_path], tmp_path / "compare.png")
    assert "nan ± nan" in capsys.readouterr().out


# Reading


def directory(path):
    path.mkdir()


def loop_of_links(path):
    path.symlink_to(path.name)


DAMAGED = {
    "": "is damaged: Expecting value",
    '{"epochs": 3': "is damaged: Expecting",
    "null": "is damaged: expected a JSON object; got 'null'",
    "[1]": "is damaged: expected a JSON object; got '[1]'",
    "[" * 100_000: "is damaged: maximum recursion depth",
    '{"epochs": ' + "9" * 5000 + "}": "is damaged: Exceeds the limit",
    b"\xff\xfe{": "is damaged: it is not UTF-8 text",
    directory: "cannot be read: it is not a regular file",
    os.mkfifo: "cannot be read: it is not a regular file",
    loop_of_links: "cannot be read: Too many levels of symbolic links",
}


def damage(path, how):
    path.unlink(missing_ok=True)
    if callable(how):
        how(path)
    else:
        path.write_bytes(how if isinstance(how, bytes) else how.encode())


@pytest.mark.parametrize("how", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_json_of_any_kind(name, how, tmp_path):
    run = make_run(tmp_path / "run", [0.5] * 3)
    damage(run / name, how)
    message = f"{run / name} {DAMAGED[how]}"
    refused(message, compare.read_run, run)
    if name == "config.json":
        refused(message, trained_run.read_config, run)
        refused(message, workdir.open_workdir, run, digits.get_config())
    else:
        refused(message, workdir.read_summary, run)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": "x"}, "config.json is damaged: "),
        ({"epochs": None}, "config.json is damaged: "),
        (
            {"cpu_devices": 100_000},
            "cpu_devices must be in [1, 512]; got 100000",
        ),
        ({"learning_rate": float("nan")}, "learning_rate must be in (0, "),
        (
            {"boundaries": ["a"]},
            "every entry of boundaries must be of type int",
        ),
        ({"norm_options": 5}, "config.json is damaged: "),
        ({"seed": True}, "seed must be of type int; got True"),
        (
            {"widths": [1]},
            "has a field 'widths' that python -m train does not know",
        ),
    ],
    ids=str,
)
def test_configs_of_strangers(changes, message, tmp_path):
    run = make_run(tmp_path / "run", [0.5] * 3)
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(message, trained_run.read_config, run)
    refused(message, trained_run.use_devices, run)


RECORDS = {
    "{}": "line 1, is damaged: epoch must be a number; got None",
    '{"epoch": 1, "step": null}': "damaged: step must be a number; got None",
    '{"epoch": 1, "step": 4, "train_loss": null}': "damaged: train_accuracy",
    "[1]": "line 1, is damaged: expected a JSON object; got '[1]'",
    "garbage": "line 1, is damaged: Expecting value",
}


@pytest.mark.parametrize("text", RECORDS)
def test_records_of_any_kind(text, tmp_path):
    run = make_run(tmp_path / "run", [0.5] * 3)
    (run / "metrics.jsonl").write_text(text + "\n")
    refused(RECORDS[text], workdir.read_records, run)
    refused(RECORDS[text], open_report, run, done=3)
    assert (run / "metrics.jsonl").read_text() == text + "\n"


def test_epochs_without_a_record_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", [0.5, 0.6, 0.7, 0.8])
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[3])
    with open_report(run, done=4) as made:
        assert [record["epoch"] for record in made.records] == [1, 4]
    assert "metrics.jsonl lacks epochs 2 to 3; continuing" in " ".join(
        capsys.readouterr().out.split()
    )
    refused(
        "metrics.jsonl lacks epochs 2 to 3. Restore it", compare.read_run, run
    )
    refused("lacks epochs 2, 3, 5, and so the result", open_report, run, done=5)
    path.write_text(lines[1] + lines[0])
    refused(
        "line 2, is damaged: epoch 1 follows epoch 2", compare.read_run, run
    )
    # What a crash has left behind the checkpoint is dropped, and nothing else.
    path.write_text("".join(lines))
    with open_report(run, done=2):
        assert path.read_text() == "".join(lines[:2])


# Whose a workdir is


def test_a_workdir_without_training_takes_another_config(tmp_path):
    config = digits.get_config()
    workdir.open_workdir(tmp_path, config)
    config.momentum = 0.5
    workdir.open_workdir(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["momentum"] == 0.5
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    config.momentum = 0.7
    refused(
        "with momentum=0.5 instead of", workdir.open_workdir, tmp_path, config
    )
    (tmp_path / "config.json").unlink()
    refused(
        "holds a run (checkpoints/4) without its config.json",
        *(workdir.open_workdir, tmp_path, config),
    )
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["a[1]", "a]", "a*", "a?", "a\\b"])
def test_names_that_orbax_takes_for_patterns(name, tmp_path):
    message = "would be treated as a glob pattern"
    config = digits.get_config()
    refused(message, workdir.open_workdir, tmp_path / name / "run", config)
    refused(message, trained_run.read_config, tmp_path / name / "run")
    assert not (tmp_path / name).exists()


# Places that take nothing


def test_a_full_disk_under_tensorboard(tmp_path, monkeypatch, capfd):
    """It is raised, by writing or by closing, and shown by no thread."""
    (tmp_path / "metrics.jsonl").touch()
    record = {"epoch": 1, "step": 4, "train_loss": 1.0, "test_loss": 1.0}
    record |= {"train_accuracy": 0.5, "test_accuracy": 0.5}
    record |= {"images_per_second": 1.0}
    full = lambda _: open("/dev/full", "wb")  # noqa: E731, SIM115
    monkeypatch.setattr(record_writer, "open_file", full)
    with (
        pytest.raises(OSError, match="No space left"),
        open_report(tmp_path, done=0) as made,
    ):
        made.add(record)
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(
        UserError, match=r"Cannot write to /x: Is a directory\."
    ):
        (tmp_path / "file").mkdir()
        with files.as_user_error("/x"):
            files.write_text(tmp_path / "file", "")
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize("where", ["/dev/full", "closed"])
def test_output_that_takes_nothing(where, tmp_path):
    script = (
        "import sys; from train import output; output.guard(); "
        "first = open(sys.argv[1], 'w'); output.say('a ±'); output.say('b'); "
        "first.close()"
    )
    closed = where == "closed"
    with open(os.devnull if closed else where, "wb") as out:
        done = subprocess.run(
            [
                *("sh", "-c", 'exec "$@"' + (" >&-" if closed else ""), "sh"),
                *(sys.executable, "-c", script, tmp_path / "first"),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 0
    # Not even what comes first gets the number of standard output.
    assert (tmp_path / "first").read_text() == ""
    said = "train: cannot write to standard output (No space left on device)"
    lines = done.stderr.splitlines()
    assert lines == ([] if closed else [said + "; continuing without it."])


def test_threads_of_libraries_show_no_traceback():
    script = (
        "import threading; from train import output; output.guard()\n"
        "class Odd:\n"
        "    def __del__(self): raise ValueError('odd')\n"
        "thread = threading.Thread(target=Odd); thread.start(); thread.join()\n"
        "Odd()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.count("ValueError: odd") == 1  # of the main thread


def test_programs_that_read_end_in_a_line(monkeypatch, capsys):
    def ends(error):
        def main(_):
            raise error

        with pytest.raises(SystemExit) as caught:
            cli.run("train.compare", main)
        return caught.value.code, capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["train.compare"])
    assert ends(UserError("so")) == (1, "train.compare: so\n")
    assert ends(KeyboardInterrupt()) == (130, "train.compare: interrupted\n")
    code, line = ends(OSError(28, "No space left on device"))
    assert code == 1 and "No space left on device" in line
    refused("required: RUN; --help lists", compare.main, [])


def test_the_picture_is_where_it_is_said(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a", [0.5] * 3)
    monkeypatch.chdir(tmp_path)
    compare.main([str(run), "--out=picture"])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith("Wrote picture.png.\n")
    assert not (tmp_path / "picture").exists()
    refused(
        "is a directory; it must be a file", compare.main, [str(run), "--out=a"]
    )
    message = "Cannot plot --out=b.doc: 'doc' is not one of "
    refused(message, compare.main, [str(run), "--out=b.doc"])


# Data


def test_a_foreign_config_downloads_to_nowhere(tmp_path, monkeypatch):
    def prepares(*_):
        raise AssertionError

    monkeypatch.setattr(cifar, "_prepare", prepares)
    load = {"data_dir": str(tmp_path), "download": False}
    refused("cifar10 is not prepared in ", data.load_dataset, "cifar10", **load)
    assert not [*tmp_path.iterdir()]

    asked = {}

    def note(config, *, download):
        asked.update(data_dir=config.data_dir, download=download)
        raise UserError("enough")

    run = make_run(tmp_path / "run", [0.5] * 3, data_dir=str(tmp_path))
    monkeypatch.setattr(trained_run, "build_experiment", note)
    refused("enough", trained_run.load_run, run)
    assert asked == {"data_dir": str(tmp_path), "download": False}
    refused("enough", trained_run.load_run, run, data_dir="/mine")
    assert asked == {"data_dir": "/mine", "download": True}


@pytest.mark.parametrize("text", ["", "null", "{", '{"name": 5}', "\xff"])
def test_damaged_description_of_the_data(text, tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(text, encoding="latin-1")
    (folder / "features.json").write_text("{}")
    refused("cifar10", data.load_dataset, "cifar10", data_dir=str(tmp_path))


def test_crops_that_would_hold_nothing_of_an_image():
    config = digits.get_config()
    config.crop_padding = 8
    refused(
        "crop_padding=8 must be less than the 8 pixels",
        build_experiment,
        config,
    )
