"""The command line, as a process of its own."""

import json
import re

import pytest

from configs import defaults
from tests.helpers.command_line import run


def lines_of(out):
    """What was printed, unwrapped; each line had at most 80 columns."""
    for line in out.splitlines():
        assert len(line) <= 80 or "/" in line, line
    lines = re.sub(r"\n +", " ", out).splitlines()
    return [line for line in lines if not line.startswith("compiled in ")]


def test_quick_start_from_anywhere(tmp_path):
    done = run(
        "--config.epochs=1",
        "--config.width=4",
        "--config.train_split=train[:128]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first, epoch, times, last = lines_of(done.stdout)
    assert first.startswith(
        "ResNet-8 (4,934 parameters) on digits: 128 training and 360 test"
    )
    assert "over 4 cpu devices" in first
    assert re.fullmatch(
        r"epoch 1/1  train \d+\.\d{4} \d+\.\d\d%  test \d+\.\d{4} "
        r"\d+\.\d\d%  [\d,]+ images/s",
        epoch,
    )
    assert re.fullmatch(r"time: (\w+ \d+\.\d%(, )?){6}", times)
    assert last.startswith("test accuracy ")
    assert done.stderr == ""
    (workdir,) = (tmp_path / "runs").glob("digits-*")
    assert json.loads((workdir / "summary.json").read_text())["devices"] == 4

    done = run(str(workdir), "--batches=2", module="train.doctor", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "sync", "over"]
    assert lines[1].split()[:4] == ["BatchNorm_0", "jaxbn", "data", "64"]
    assert len(lines[1:8]) == 7 and not lines[8]
    assert lines[9].split()[:3] == ["layer", "z", "KL"]
    assert not lines[17] and lines[18].startswith("sync: ")  # the legend
    assert "\ndoctor.png, layers from left to right" in done.stdout
    assert lines[-1] == f"Wrote {workdir / 'doctor.png'}."
    assert all(len(line) <= 80 for line in lines[:-1])
    assert "\nOver 2 batches the model's output differs" in done.stdout
    # Two steps with momentum 0.9 are not enough, and it says so.
    assert "have not converged" in done.stdout
    done = run(str(workdir), "--precise=2", module="train.evaluate")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "digits test, 360 images, at step 2 (epoch 1):" in done.stdout
    assert "recomputed over 2 training batches" in done.stdout
    picture = (workdir / "doctor.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.batchsize=3"],
            "There is no config.batchsize; did you mean config.batch_size?",
        ),
        (
            ["--config.zzz=3"],
            "There is no config.zzz; configs/defaults.py has all fields.",
        ),
        (
            ["--config=nowhere.py"],
            "There is no file nowhere.py; configs/ holds cifar10_94.py, ",
        ),
        (
            ["--config.batch_size=abc"],
            "flag --config.batch_size=abc: invalid literal for int() with "
            "base 10: 'abc'",
        ),
        (
            ["--config.batch_size=126"],
            "batch_size=126 must be divisible by 4 devices, such as 124 "
            "or 128.",
        ),
        (
            ["--config.norm_options.normalize_over=7"],
            "norm='jaxbn': normalize_over=7 neither divides the 16 examples "
            "per device nor is a multiple that divides 4 devices; the nearest "
            "valid value is 8.",
        ),
        (
            ["--stall_limit=nan"],
            "flag --stall_limit=nan: must be finite and not negative, in "
            "seconds",
        ),
        (["again"], "Unexpected argument 'again'; flags begin with --."),
        (["--workdri=x"], "Unknown command line flag 'workdri'"),
    ],
)
def test_bad_command_line_is_one_clear_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith(f"train: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_help_shows_every_field():
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in defaults.get_config():
        assert f"--config.{name}" in done.stdout
    assert "--coordinator: HOST:PORT" in done.stdout
    assert "arguments.py" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for name in ("evaluate", "compare", "doctor", "export", "pretrained"):
        assert re.search(
            rf"^  python -m train\.{name} +[A-Z]", done.stdout, re.M
        )
    assert "python -m train " not in done.stdout.partition("Other pro")[2]
    assert "--list: " in done.stdout and "--config:" in done.stdout


@pytest.mark.parametrize("flag", ["--list", "--config=nothing.py --list"])
def test_list_of_configs(flag):
    done = run(*flag.split())
    assert done.returncode == 0 and done.stderr == ""
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    (digits,) = re.findall(r"^configs/digits.py\n(?:.+\n)*", done.stdout, re.M)
    assert digits.splitlines()[:3] == [
        "configs/digits.py",
        "  ResNet-8 on scikit-learn's handwritten digits: no download.",
        "  98.1 to 98.6% on the 360 test images (seeds 0 to 3) in about 20 s "
        "on two CPU",
    ]
    assert "  The paper reports 91.25%. Not yet" in done.stdout
    assert re.search(r"\n  28-10 +96\.00%  ", done.stdout)
    names = set(re.findall(r"^configs/(.*)$", done.stdout, re.M))
    assert {"resnet_cifar.py", "large_batch.py"} <= names
    assert not {"defaults.py", "arguments.py", "ranges.py"} & names


@pytest.mark.parametrize("name", ["evaluate", "compare", "doctor", "export"])
def test_help_of_the_other_programs(name):
    done = run("--help", module=f"train.{name}")
    assert done.returncode == 0 and done.stderr == ""
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_the_doctor_of_no_run(tmp_path):
    done = run(str(tmp_path / "none"), module="train.doctor")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "is not a run" in line and "Use the --workdir of a run" in line


def test_missing_data_directory(tmp_path):
    done = run(
        "--config=configs/resnet20_cifar10.py",
        f"--config.data_dir={tmp_path / 'nothing'}",
    )
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert len(done.stderr.splitlines()) <= 2
