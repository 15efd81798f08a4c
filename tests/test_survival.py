"""Runs that are killed, stopped, starved and spread, as real processes."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EPOCHS, STEPS = 13, 4  # an epoch; 52 steps in all

# python -m train with a smooth nonlinearity. A ReLU at zero makes of the last
# bit of a sum the whole of a gradient, and runs on other devices then part.
TRAIN = """
import runpy
import flax.linen as nn
nn.relu = nn.gelu
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""
SMALL = (
    "--config.width=4",
    f"--config.epochs={EPOCHS}",
    "--config.train_split=train[:256]",
    "--config.test_split=test[:96]",
    "--config.test_batch_size=96",
    "--config.checkpoint_every=3",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """So that one program is compiled once for all processes."""
    return str(tmp_path_factory.mktemp("compiled"))


def start(workdir, cache, *arguments, devices=8, environment=(), prefix=()):
    environment = {
        **os.environ,
        **dict(environment),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [
            *prefix,
            sys.executable,
            *("-c", TRAIN),
            f"--workdir={workdir}",
            f"--config.cpu_devices={devices}",
            *SMALL,
            *arguments,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, timeout=240):
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


def start_two(workdir, cache, *arguments, each=((), ())):
    port = free_port()
    return [
        start(
            workdir,
            cache,
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            *arguments,
            *each[i],
            devices=4,
        )
        for i in range(2)
    ]


def start_two_by_slurm(workdir, cache):
    """What srun --ntasks=2 tells its tasks, from which all else follows."""
    base = 2**16 - 2**12
    environment = {
        "SLURM_JOB_ID": str(free_port(base + 100) - base),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    return [
        start(
            workdir,
            cache,
            devices=4,
            environment={
                **environment,
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": str(i),
            },
        )
        for i in range(2)
    ]


def steps_of(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def wait_until(condition, process, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.01)


def newest_state(workdir):
    """Arrays of the newest checkpoint by path, as numpy."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path = workdir / "checkpoints" / str(steps_of(workdir)[-1]) / "state"
    with ocp.StandardCheckpointer() as reader:
        target = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here),
            reader.metadata(path).item_metadata.tree,
        )
        found = reader.restore(path, target)
    flat, _ = jax.tree_util.tree_flatten_with_path(found)
    return {
        jax.tree_util.keystr(path): np.asarray(value) for path, value in flat
    }


def records_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_speed(records):
    return [
        {k: v for k, v in one.items() if k != "images_per_second"}
        for one in records
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out, error = end(start(workdir, cache))
    assert code == 0, error
    assert out.splitlines()[-1].startswith("test accuracy ")
    return workdir


def test_a_run_that_suffers_ends_bit_for_bit_as_one_that_did_not(
    undisturbed, tmp_path, cache
):
    workdir = tmp_path / "run"

    # SIGTERM: saves, and asks to be started again.
    process = start(workdir, cache)
    wait_until(lambda: steps_of(workdir), process)
    process.terminate()
    code, _, error = end(process)
    assert code == 75, error
    assert "the same command goes on from there" in error
    stopped = steps_of(workdir)[-1]
    assert f"saved at step {stopped};" in error

    # A disk that takes no more: one line, and the checkpoint stays whole.
    full = "bash", "-c", 'ulimit -f 6; exec "$@"', "bash"  # KiB of a file
    code, _, error = end(start(workdir, cache, prefix=full))
    assert code == 1
    # Threads of the libraries may have had a word before.
    (last,) = re.findall("^train: .*", error, re.MULTILINE)
    assert last.startswith("train: Cannot write"), error
    assert f"The checkpoint of step {stopped} is whole" in last
    assert steps_of(workdir)[-1] == stopped

    # kill -9, while a checkpoint is being written or just was.
    process = start(workdir, cache)
    folder = workdir / "checkpoints"
    wait_until(
        lambda: (
            any("tmp" in name for name in os.listdir(folder))
            or steps_of(workdir)[-1] > stopped
        ),
        process,
    )
    process.kill()
    assert end(process)[0] == -signal.SIGKILL

    # A newest checkpoint that was cut off: put aside, with a warning.
    process = start(workdir, cache)
    before = steps_of(workdir)[-1]
    wait_until(lambda: steps_of(workdir)[-1] > before + 1, process)
    process.kill()
    end(process)
    damaged = steps_of(workdir)[-1]
    for path in (folder / str(damaged)).rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)

    code, _, error = end(start(workdir, cache))
    assert code == 0, error
    assert f"The checkpoint of step {damaged} cannot be read" in error
    assert (workdir / f"damaged-checkpoint-{damaged}").is_dir()

    want, got = newest_state(undisturbed), newest_state(workdir)
    assert want.keys() == got.keys() and len(want) > 30
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert without_speed(records_of(workdir)) == without_speed(
        records_of(undisturbed)
    )


def test_two_processes_are_one_run_and_any_topology_goes_on_with_it(
    undisturbed, tmp_path, cache
):
    """2 x 4 devices to the end; then half of it there, half on 2 devices.

    The first two are told where they meet, the others are two tasks of SLURM.
    """
    workdir = tmp_path / "two"
    first, second = start_two(workdir, cache)
    code, out, error = end(first)
    assert code == 0, error
    code, silent, error = end(second)
    # The library of collectives announces itself, several threads at once.
    assert code == 0, error
    assert not re.search("epoch|loss|accuracy|train", silent), silent
    assert "8 cpu devices (data=8, 2 processes)" in out
    want, got = newest_state(undisturbed), newest_state(workdir)
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-3
        np.testing.assert_allclose(
            got[name], value, atol=1e-4 * scale, rtol=0, err_msg=name
        )
    losses = [
        [record["train_loss"] for record in records_of(path)]
        for path in (workdir, undisturbed)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)

    moved = tmp_path / "moved"
    both = start_two_by_slurm(moved, cache)
    wait_until(lambda: steps_of(moved), both[0])
    both[1].terminate()  # one is told, both stop at the same step
    ends = [end(process) for process in both]
    assert [code for code, *_ in ends] == [75, 75], ends
    assert steps_of(moved)[-1] < EPOCHS * STEPS
    code, _, error = end(start(moved, cache, devices=2))
    assert code == 0, error
    got = newest_state(moved)
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-3
        np.testing.assert_allclose(
            got[name], value, atol=1e-4 * scale, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("fate", ["dies", "stops", "raises"])
def test_a_process_that_is_lost_ends_the_others(fate, tmp_path, cache):
    workdir = tmp_path / "run"
    each = ((), ())
    if fate == "raises":
        (tmp_path / "file").touch()
        each = ((), (f"--workdir={tmp_path / 'file'}",))
    longer = "--config.epochs=10000"
    left, lost = start_two(workdir, cache, longer, each=each)
    try:
        if fate == "raises":
            code, _, error = end(lost)
            assert code == 1
            assert "Cannot write to --workdir" in error, error
        else:
            wait_until(lambda: steps_of(workdir), left)
            lost.send_signal(
                signal.SIGKILL if fate == "dies" else signal.SIGSTOP
            )
        since = time.monotonic()
        code, _, error = end(left, timeout=60)
        assert time.monotonic() - since < 30
        assert code != 0
        assert re.search("another task died|heartbeat|unhealthy", error)
    finally:
        left.kill()
        lost.kill()
        end(lost)


def test_a_workdir_that_cannot_be(cache):
    code, _, error = end(start("/proc/nowhere", cache))
    assert code == 1
    assert "Cannot write to --workdir=/proc/nowhere" in error


def test_processes_that_cannot_be(tmp_path, cache):
    for arguments, message in (
        (
            ["--coordinator=127.0.0.1:1"],
            "--num_processes and --process_id is missing",
        ),
        (
            [
                "--coordinator=127.0.0.1:1",
                "--num_processes=2",
                "--process_id=2",
            ],
            "must be from 0 to num_processes - 1, which is 1",
        ),
    ):
        code, _, error = end(start(tmp_path, cache, *arguments))
        assert code == 1 and message in error
    shutil.rmtree(tmp_path)
