"""Several processes: started differently, lost, hanging, resumed."""

import json
import os
import re
import signal
import socket
import time

import jax
import pytest

from tests.helpers.runs import (
    ROOT,
    TINY,
    end,
    end_all,
    end_started,
    free_port,
    one_line,
    start,
    start_two,
    steps_of,
    wait_until,
)
from train import UserError, distributed, lock


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    end_started()


LONG = "--config.epochs=10000"


def log_of(line):
    """What the line says where the original error is."""
    path = re.search(r"The original error is in (.*)\.$", line)[1]
    with open(path) as file:
        return file.read()


@pytest.mark.slow
def test_two_processes_stopped_and_started_again_end_well(tmp_path):
    epochs = LONG.replace("10000", "20")
    once = "--config.checkpoint_every=0"
    both = start_two(tmp_path, epochs, once)
    wait_until(lambda: len(steps_of(tmp_path)) > 1, both[0])
    both[0].send_signal(signal.SIGTERM)
    assert [code for code, *_ in end_all(both)] == [75, 75]
    assert steps_of(tmp_path)[-1] < 80
    ends = end_all(start_two(tmp_path, epochs, once))
    assert [(code, error) for code, _, error in ends] == [(0, "")] * 2
    # Of the run alone, and of nothing that a library prints.
    assert ends[1][1] == ""
    for line in ends[0][1].splitlines():  # long ones are wrapped
        assert re.match("ResNet|epoch |about |time: |test accuracy |  ", line)
    assert "results in" in ends[0][1]
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20


# Met, but not alike

OTHER_CODE = (
    TINY + "\nfrom train import processes\nprocesses._source_digest = lambda: 1"
)


@pytest.mark.parametrize(
    "each, patches, message",
    [
        (
            (
                ("--config.checkpoint_every=5",),
                ("--config.num_seeds=2", "--num_processes=3"),
            ),
            None,
            "The processes differ: checkpoint_every is 5 in process 0 and 3 in "
            "process 1; num_processes is 2 in process 0 and 3 in process 1; "
            "num_seeds is 1 in process 0 and 2 in process 1. Run the same "
            "command on all hosts",
        ),
        pytest.param(
            ((), ()),
            (TINY, OTHER_CODE),
            "the code in jaxbn, train and configs is '",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_differ(each, patches, message, tmp_path):
    for code, _, error in end_all(
        start_two(tmp_path / "run", each=each, patches=patches)
    ):
        assert code == 1
        assert message in one_line(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_that_they_do_not_share(tmp_path):
    each = (f"--workdir={tmp_path / 'a'}",), (f"--workdir={tmp_path / 'b'}",)
    for code, _, error in end_all(start_two(tmp_path, each=each)):
        assert code == 1
        assert "is not the same directory on all hosts" in one_line(error)
    assert not steps_of(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, each, message",
    [
        ("file", ((), ()), "Cannot write to --workdir="),
        ("run", ((), ("--config.data_dir=/no",)), "The data directory '/no' d"),
    ],
)
def test_an_error_of_one_is_told_by_all(name, each, message, tmp_path):
    (tmp_path / "file").touch()
    for code, _, error in end_all(start_two(tmp_path / name, each=each)):
        assert code == 1
        assert one_line(error).startswith(message)


# Not met


def test_a_coordinator_that_cannot_be():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments, message in (
            (
                ("127.0.0.1:1", None, None),
                "--num_processes and --process_id is missing",
            ),
            (
                ("127.0.0.1:1", 2, 2),
                "must be from 0 to 1, num_processes - 1",
            ),
            (("127.0.0.1:1", 0, 0), "--num_processes=0 must be at least 1"),
            (
                (address, 2, 0),
                "Address already in use. Use an address of its host and a "
                "free port.",
            ),
            (("203.0.113.1:9876", 2, 0), "Cannot assign requested address"),
            (
                ("nowhere.invalid:9876", 2, 0),
                "cannot listen on --coordinator=nowhere.invalid:9876",
            ),
            (("x..y:9876", 2, 0), "9876: it is not a valid host name. Use"),
            (
                ("127.0.0.1", 2, 1),
                "--coordinator=127.0.0.1 must be HOST:PORT of process 0",
            ),
        ):
            with pytest.raises(UserError, match=re.escape(message)):
                distributed.initialize(*arguments)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_name_of_loopback_is_not_listened_to_everywhere(address, monkeypatch):
    find, given = socket.getaddrinfo, {}

    def resolve(host, *arguments, **options):
        return find(address if host == "here" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    note = lambda *_, **options: given.update(options)  # noqa: E731
    monkeypatch.setattr(jax.distributed, "initialize", note)
    port = free_port()
    distributed.initialize(f"here:{port}", 2, 0)
    shown = f"[{address}]" if ":" in address else address
    assert given["coordinator_bind_address"] == f"{shown}:{port}"


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_one_process_alone_waits_no_longer_than_a_minute(process, tmp_path):
    since = time.monotonic()
    code, _, error = end(
        start(
            tmp_path / "run",
            f"--coordinator=127.0.0.1:{free_port()}",
            "--num_processes=2",
            f"--process_id={process}",
        )
    )
    assert time.monotonic() - since < 75
    assert code == 1
    assert re.match(
        "The processes did not connect|Nothing listens", one_line(error)
    )


# Lost


@pytest.mark.parametrize(
    "lost, number",
    [
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_lost_ends_the_others(lost, number, tmp_path):
    both = start_two(tmp_path, LONG)
    wait_until(lambda: steps_of(tmp_path), both[0])
    both[lost].send_signal(number)
    since = time.monotonic()
    try:
        code, _, error = end(both[1 - lost], timeout=60)
        assert time.monotonic() - since < 30
    finally:
        both[lost].kill()
        end(both[lost])
    assert code == 75
    line = one_line(error)
    assert line.startswith("Lost the connection to another process")
    assert re.search("Gloo|coordination|JAX distributed service", log_of(line))


HANGS = """
from train import batching
import time
batches = batching.train_batches
def hang(*a, epoch, **k):
    if epoch == 2:
        time.sleep(1000)
    return batches(*a, epoch=epoch, **k)
batching.train_batches = hang
"""


@pytest.mark.slow
def test_a_process_that_hangs_in_python_ends_all(tmp_path):
    """Its heartbeat goes on; the reader of its batches does not."""
    both = start_two(
        tmp_path, LONG, "--stall_limit=20", patches=(TINY, TINY + HANGS)
    )
    for code, _, error in end_all(both):
        assert code == 75
        line = one_line(error)
        assert re.match("No progress for 20 s|Lost the connection", line)
    assert "hang" in (tmp_path / "error-1.log").read_text()


RESET = """
from train import checkpoint
def save(*_, **__):
    raise ConnectionResetError(104, "Connection reset by peer")
checkpoint.Checkpoints.save = save
"""


def test_an_error_of_ones_own_is_no_lost_process(tmp_path):
    code, _, error = end(start(tmp_path, patch=TINY + RESET))
    assert code == 1
    line = one_line(error)
    assert line.startswith("Unexpected ConnectionResetError: [Errno 104] ")
    assert "in save\n" in log_of(line)
    assert (tmp_path / "error.log").exists()


# One workdir, two runs


def test_the_second_to_take_a_workdir_is_told_who_has_it(tmp_path):
    message = rf"Another run \(process {os.getpid()} on .* is using"
    with lock.locked(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=message),
            lock.locked(tmp_path / "run"),
        ):
            pass
        with lock.locked(tmp_path / "other"):
            pass
    with lock.locked(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_a_workdir_belongs_to_one_run_at_a_time(tmp_path):
    first = start(tmp_path, LONG)
    try:
        wait_until(lambda: steps_of(tmp_path), first)
        code, _, error = end(start(tmp_path, LONG))
        assert code == 1
        line = one_line(error)
        assert re.search(rf"Another run \(process {first.pid} on .*since", line)
    finally:
        first.kill()
        end(first)
    # The lock has died with it.
    second = start(tmp_path, LONG)
    before = steps_of(tmp_path)[-1]
    wait_until(lambda: steps_of(tmp_path)[-1] > before, second)
    second.kill()
    end(second)


@pytest.mark.slow
def test_workdirs_by_name(tmp_path):
    code, _, error = end(start(""))
    assert code == 1 and "--workdir= is empty" in one_line(error)
    code, _, error = end(start(tmp_path / "a[1]"))
    assert code == 1 and "would be treated as a glob pattern" in one_line(error)
    assert not [*tmp_path.iterdir()]
    home = {"HOME": str(tmp_path)}
    process = start("~/run", "--config.epochs=1", environment=home)
    code, _, error = end(process)
    assert (code, error) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()
    assert not [*ROOT.glob("~*")]
