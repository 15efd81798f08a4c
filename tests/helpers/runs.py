"""Runs as real processes: started, watched, disturbed and ended."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
EPOCHS, STEPS = 13, 4  # an epoch; 52 steps in all

# python -m train, after a patch.
TRAIN = """
import runpy
{patch}
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""
# A network that compiles in a second, where it does not matter which.
TINY = """
from tests.helpers import tiny_network
from train import networks

networks.make = tiny_network.make
"""
SMALL = (
    "--config.width=4",
    f"--config.epochs={EPOCHS}",
    "--config.train_split=train[:256]",
    "--config.test_split=test[:96]",
    "--config.test_batch_size=96",
    "--config.checkpoint_every=3",
)

started = []


def start(
    workdir,
    *arguments,
    patch=TINY,
    devices=2,
    environment=(),
    prefix=(),
    **options,
):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **dict(environment),
    }
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(
        [
            *prefix,
            sys.executable,
            *("-c", TRAIN.format(patch=patch)),
            f"--workdir={workdir}",
            f"--config.cpu_devices={devices}",
            *SMALL,
            *arguments,
        ],
        cwd=ROOT,
        env=environment,
        text=True,
        # Where pytest itself is in the background, Ctrl-C would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    started.append(process)
    return process


def end_started():
    """Ends what a test that failed has left behind."""
    while started:
        process = started.pop()
        process.kill()
        process.wait()


def end(process, timeout=300):
    """Returns exit code, standard output and error."""
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, error


def free_port(first=0):
    with socket.socket() as one:
        while True:
            try:
                one.bind(("127.0.0.1", first))
            except OSError:
                first += 1
                continue
            return one.getsockname()[1]


def start_two(workdir, *arguments, each=((), ()), patches=None, **options):
    port = free_port()
    options = {"devices": 1} | options
    return [
        start(
            workdir,
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            *arguments,
            *each[i],
            **({"patch": patches[i]} if patches else {}),
            **options,
        )
        for i in range(2)
    ]


def end_all(processes, timeout=300):
    """Returns what `end` does for each; none is left behind."""
    try:
        return [end(process, timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps_of(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def wait_until(condition, process, seconds=300):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.01)


def strict_json(text):
    """Parses JSON as jq and browsers do: NaN and Infinity are errors."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON: {text}")

    return json.loads(text, parse_constant=refuse)


def one_line(error):
    """The only line of a standard error, without the program's name."""
    (line,) = error.splitlines()
    assert line.startswith("train: "), error
    return line.removeprefix("train: ")
