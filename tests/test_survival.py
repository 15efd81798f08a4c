"""Runs that are killed, stopped, starved and spread, as real processes."""

import functools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import runs
from tests.helpers.runs import (
    EPOCHS,
    STEPS,
    end,
    free_port,
    steps_of,
    wait_until,
)

# So wide that its checkpoint is larger than the files of a full disk.
WIDE = runs.TINY.replace("Dense(8)", "Dense(64)")
start = functools.partial(runs.start, patch=WIDE, devices=8)
start_two = functools.partial(runs.start_two, patch=WIDE, devices=4)


def start_two_by_slurm(workdir):
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
            devices=4,
            environment={
                **environment,
                "SLURM_PROCID": str(i),
                "SLURM_LOCALID": str(i),
            },
        )
        for i in range(2)
    ]


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


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-3
        np.testing.assert_allclose(
            got[name], value, atol=1e-4 * scale, rtol=0, err_msg=name
        )


def records_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_speed(records):
    return [
        {k: v for k, v in one.items() if k != "images_per_second"}
        for one in records
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out, error = end(start(workdir))
    assert code == 0, error
    assert re.search("^test accuracy ", out, re.MULTILINE)
    return workdir


@pytest.mark.slow
def test_a_run_that_suffers_ends_bit_for_bit_as_one_that_did_not(
    undisturbed, tmp_path
):
    workdir = tmp_path / "run"

    # SIGTERM: saves, and asks to be started again.
    process = start(workdir)
    wait_until(lambda: steps_of(workdir), process)
    process.terminate()
    code, _, error = end(process)
    assert code == 75, error
    assert f"rerun the same command with --workdir={workdir} to resume" in error
    stopped = steps_of(workdir)[-1]
    assert f"saved at step {stopped};" in error

    # A disk that takes no more: one line, and the checkpoint stays whole.
    # Small checkpoints fit, so there is none before the curves of an epoch.
    full = "bash", "-c", 'ulimit -f 6; exec "$@"', "bash"  # KiB of a file
    none = "--config.checkpoint_every=0"
    code, _, error = end(start(workdir, none, prefix=full))
    assert code == 1
    # Threads of the libraries may have had a word before.
    (last,) = re.findall("^train: .*", error, re.MULTILINE)
    assert last.startswith("train: Cannot write"), error
    assert f"resume from the checkpoint of step {stopped}." in last
    assert steps_of(workdir)[-1] == stopped

    # kill -9, as soon as a checkpoint was written.
    process = start(workdir)
    wait_until(lambda: steps_of(workdir)[-1] > stopped + 1, process)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL

    # A newest checkpoint that was cut off: put aside, with a warning.
    damaged = steps_of(workdir)[-1]
    for path in (workdir / "checkpoints" / str(damaged)).rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)

    code, _, error = end(start(workdir))
    assert code == 0, error
    assert len(error.splitlines()) == 1
    assert f"The checkpoint of step {damaged} is damaged" in error
    assert (workdir / f"damaged-checkpoint-{damaged}").is_dir()

    want, got = newest_state(undisturbed), newest_state(workdir)
    assert want.keys() == got.keys()
    for part in ("step", "params", "batch_stats", "opt_state"):
        assert any(name.startswith(f"['{part}']") for name in want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert without_speed(records_of(workdir)) == without_speed(
        records_of(undisturbed)
    )


@pytest.mark.slow
def test_two_processes_are_one_run_and_any_topology_goes_on_with_it(
    undisturbed, tmp_path
):
    """Half of it on 2 x 4 devices, the rest there or on 2 devices.

    The first two are tasks of SLURM, the others are told where they meet.
    """
    workdir = tmp_path / "two"
    both = start_two_by_slurm(workdir)
    wait_until(lambda: steps_of(workdir), both[0])
    both[1].terminate()  # one is told, both stop at the same step
    ends = [end(process) for process in both]
    assert [code for code, *_ in ends] == [75, 75], ends
    assert steps_of(workdir)[-1] < EPOCHS * STEPS
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)

    first, second = start_two(workdir)
    code, out, error = end(first)
    assert code == 0, error
    code, silent, error = end(second)
    # The library of collectives announces itself, several threads at once.
    assert code == 0, error
    assert not re.search("epoch|loss|accuracy|train", silent), silent
    assert "8 cpu devices (data=8, 2 processes)" in " ".join(out.split())
    assert_close(newest_state(workdir), newest_state(undisturbed))
    losses = [
        [record["train_loss"] for record in records_of(path)]
        for path in (workdir, undisturbed)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)

    code, _, error = end(start(moved, devices=2))
    assert code == 0, error
    assert_close(newest_state(moved), newest_state(undisturbed))


def test_a_workdir_that_cannot_be():
    code, _, error = end(start("/proc/nowhere"))
    assert code == 1
    assert "Cannot write to --workdir=/proc/nowhere" in error
