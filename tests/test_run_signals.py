"""Ctrl-C and SIGTERM at any moment of a run, by real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import (
    ROOT,
    TINY,
    TRAIN,
    end,
    end_all,
    end_started,
    one_line,
    start,
    start_two,
    started,
    steps_of,
    wait_until,
)


def start_script(script):
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    started.append(process)
    return process


CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    end_started()


LONG = "--config.epochs=10000"
# Says when it is there, and stays for ten seconds in C, or in an import.
COMPILING = """
from train import programs
make = programs.make_train_program

def slow(*a, **k):
    import ctypes
    print("compiling", flush=True)
    ctypes.CDLL(None).sleep(20)
    return make(*a, **k)

programs.make_train_program = slow
"""
IMPORTING = """
import sys, time
class Slow:
    def find_spec(self, name, path, target=None):
        if name == "matplotlib":
            print("importing", flush=True)
            time.sleep(20)
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_run_saves_and_says_so_in_one_line(number, tmp_path):
    process = start(tmp_path, LONG)
    wait_until(lambda: steps_of(tmp_path), process)
    process.send_signal(number)
    code, _, error = end(process)
    assert code == CODES[number]
    step = steps_of(tmp_path)[-1]
    assert one_line(error).startswith(f"Stopped and saved at step {step};")


@pytest.mark.parametrize(
    "patch, number",
    [
        (IMPORTING, signal.SIGINT),
        pytest.param(IMPORTING, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(TINY + COMPILING, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(TINY + COMPILING, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_before_the_first_step_it_leaves_at_once(patch, number, tmp_path):
    process = start(tmp_path, LONG, patch=patch)
    for line in process.stdout:
        if line in ("importing\n", "compiling\n"):
            break
    since = time.monotonic()
    process.send_signal(number)
    code, _, error = end(process)
    assert time.monotonic() - since < 8
    assert code == CODES[number]
    assert one_line(error).startswith(
        "Stopped with nothing to save; rerun the "
    )


@pytest.mark.parametrize("program", ["evaluate", "doctor", "compare"])
def test_other_programs_end_while_they_import(program):
    patch = IMPORTING.replace("matplotlib", "numpy")
    script = TRAIN.format(patch=patch).replace("train", f"train.{program}", 1)
    process = start_script(script)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    code, _, error = end(process, timeout=10)
    assert (code, error) == (130, f"train.{program}: interrupted\n")


def test_a_reader_that_takes_nothing_keeps_no_program():
    """As a pager does: standard output is full, and is written to."""
    process = start_script(
        "import threading; from train import exits\n"
        "threading.Timer(0.5, exits.exit_now, ('so', 75)).start()\n"
        "while True: print('x' * 1000)"
    )
    assert process.wait(timeout=10) == 75
    assert process.stderr.read() == "train: so\n"


# A file system that does not answer, once there is something to save.
STUCK = """
from train import checkpoint
import time
def save(*_, **__):
    print("saving", flush=True)
    time.sleep(100)
checkpoint.Checkpoints.save = save
"""


def test_a_second_one_leaves_at_once(tmp_path):
    process = start(tmp_path, LONG, patch=TINY + STUCK)
    for line in process.stdout:
        if line == "saving\n":
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, error = end(process)
    assert time.monotonic() - since < 5
    assert code == 130
    assert one_line(error).startswith("Exited immediately, without saving; ")


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_stops_both_at_a_step(tmp_path):
    both = start_two(tmp_path, LONG)
    wait_until(lambda: steps_of(tmp_path), both[0])
    both[1].send_signal(signal.SIGINT)
    (code, _, error), (other, _, its) = end_all(both)
    assert (code, other) == (75, 130)
    step = steps_of(tmp_path)[-1]
    for said in (error, its):
        assert one_line(said).startswith(f"Stopped and saved at step {step};")


def test_where_no_program_listens_sigterm_alone_is_noted():
    from train.signals import Interrupt

    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested and interrupt.code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert not interrupt.requested
