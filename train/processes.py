"""The processes of a run: how they meet, compare notes and fail together."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import itertools
import json
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from train import UserError

# A process that is gone is noticed after this many seconds; JAX waits 100.
HEARTBEAT = 15
# So long a process that has finished, or failed, waits for the others.
SHUTDOWN = 10
# Within so many seconds all have to be there.
MEET = 50
# The watchdog ends a run that waits too long; this is only longer.
_FOR_EVER = 7 * 24 * 3600


class Agreed(UserError):
    """One that all processes raise at the same place."""


_TIMEOUTS = {
    "heartbeat_timeout_seconds": HEARTBEAT,
    "shutdown_timeout_seconds": SHUTDOWN,
}
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_numbers = itertools.count()


def start(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    prepare: Callable[[int], Any] = lambda _: None,
) -> None:
    """Joins the processes of a run, before the first use of a device.

    Without arguments JAX looks for what SLURM, Open MPI, Kubernetes or a Cloud
    TPU say; where there is none of them the run has one process.

    Args:
      coordinator: HOST:PORT where process 0 is to be met.
      num_processes: of the run.
      process_id: of this one.
      prepare: is called with process_id before several processes meet.

    Raises:
      UserError: some of the arguments are given and others not, or the
        processes do not find each other.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id go together; "
            f"{' and '.join('--' + name for name in missing)} is missing."
        )
    options: dict[str, Any] = {}
    if missing:
        found = _detected()
        if found is None:
            return
        coordinator, num_processes, process_id, devices = found
        options["local_device_ids"] = devices
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to num_processes - 1, "
            f"which is {num_processes - 1}."
        )
    host, port = _address(coordinator)
    limit = time.monotonic() + MEET
    if process_id == 0:
        bound = _probe(host, port, given_by_user=not missing)
        if bound:
            options["coordinator_bind_address"] = coordinator
    else:
        _reach(host, port, limit)
    prepare(process_id)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=max(5, int(limit - time.monotonic())),
            **options,
            **_TIMEOUTS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Process {process_id} of {num_processes} did not meet the others "
            f"at {coordinator}: {' '.join(str(error).split())[:300]}"
        ) from error


def _detected() -> tuple[str, int, int, Any] | None:
    """What JAX finds out about the processes from the environment."""
    from jax._src import clusters  # no public way leads to the address

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, MEET
    )
    return None if None in found[:3] else found


def _address(coordinator: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:\s]+):(\d{1,5})", coordinator)
    if not found or not 0 < int(found[2]) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} must be HOST:PORT of process 0, such "
            "as 10.0.0.1:9876."
        )
    return found[1].strip("[]"), int(found[2])


def _probe(host: str, port: int, *, given_by_user: bool) -> bool:
    """Whether to listen at this very address; JAX crashes where it cannot.

    A name of this host may stand for its loopback here and for another address
    elsewhere: there, as where the environment gave the address, JAX listens at
    all of them.
    """
    address, family = host, socket.AF_INET
    try:
        family, *_, (address, *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        everywhere = not given_by_user or (
            loopback and host not in (address, "localhost")
        )
        with socket.socket(family, socket.SOCK_STREAM) as one:
            # Connections of a run before may still be closing.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("" if everywhere else address, port))
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen at --coordinator={host}:{port}: "
            f"{error.strerror}. Give an address of its own host and a free port."
        ) from error
    return not everywhere


def _reach(host: str, port: int, limit: float) -> None:
    """Returns once process 0 listens."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() < limit:
                time.sleep(0.2)
                continue
            raise UserError(
                f"Nobody listens at --coordinator={host}:{port} after {MEET} s "
                f"({error.strerror or error}). Start process 0 there within "
                "that time, or correct the address."
            ) from error
        return


def exchange(text: str, *, seconds: float = _FOR_EVER) -> list[str]:
    """Returns what each process gives here, by their index.

    By way of the coordinator, not of the devices: it works before they do.
    """
    if jax.process_count() == 1:
        return [text]
    return _exchange(text, seconds)


def _exchange(text: str, seconds: float) -> list[str]:
    from jax._src import distributed  # its client is not public

    state, key = distributed.global_state, f"train/{next(_numbers)}"
    state.client.key_value_set(f"{key}/{state.process_id}", text)
    found = []
    for process in range(state.num_processes):
        try:
            found.append(
                state.client.blocking_key_value_get(
                    f"{key}/{process}", int(1000 * seconds)
                )
            )
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise UserError(
                f"Process {process} did not answer within {seconds:g} s: it "
                "hangs, or was started with another program."
            ) from error
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes what is wrong in one process an error in all of them.

    All have to come here; what is inside must not wait for the others.

    Raises:
      Agreed: one of them raised UserError inside.
    """
    own, wrong = None, ""
    try:
        yield
    except UserError as error:
        own, wrong = error, str(error)
    if own is not None and jax.process_count() == 1:
        raise own
    for said in exchange(wrong):
        if said:
            raise Agreed(said) from own


def from_main(make: Callable[[], Any]) -> Any:
    """Returns in all processes what make gives in the main one, as JSON."""
    found = "null"
    with together():
        if jax.process_index() == 0:
            found = json.dumps(make())
    return json.loads(exchange(found)[0])


def agree(config: ConfigDict, versions: dict[str, str]) -> None:
    """Checks that all processes were started alike, and connects their devices.

    Those that were not would wait for each other for ever.

    Raises:
      Agreed: they differ, with what and where.
    """
    from jax._src import distributed

    if distributed.global_state.client is None:
        return
    own = {
        **json.loads(config.to_json()),
        **{f"the version of {name}": v for name, v in versions.items()},
        "num_processes": distributed.global_state.num_processes,
        "the code in jaxbn, train and configs": _code(),
    }
    del own["data_dir"]  # may be another one on each host
    every = [json.loads(each) for each in _exchange(json.dumps(own), MEET)]
    differences = [
        f"{key} is {every[0].get(key)!r} in process 0 and {one.get(key)!r} in "
        f"process {process}"
        for process, one in enumerate(every)
        for key in sorted({*every[0], *one})
        if every[0].get(key) != one.get(key)
    ]
    if differences:
        more = len(differences) - 3
        listed = "; ".join(differences[:3])
        raise Agreed(
            f"The processes were started differently: {listed}"
            f"{f'; and {more} more' if more > 0 else ''}. Give the same command "
            "on all hosts, with the same code and packages."
        )
    # At once, while all are here: their libraries wait only 30 s for each
    # other, and a program that takes long to compile on one host is too late.
    multihost_utils.sync_global_devices("start")


def _code() -> str:
    digest = hashlib.sha256()
    for folder in ("configs", "jaxbn", "train"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# How collectives and the coordinator fail where the other end is gone.
_LOST = re.compile(
    "closed by peer|reset by peer|[Bb]roken pipe|gloo/transport|Gloo|"
    "coordination service|heartbeat|[Bb]arrier|UNAVAILABLE|DEADLINE_EXCEEDED"
)


def is_lost(error: BaseException | None) -> bool:
    """Whether JAX raised this because another process is gone.

    An error of a file system or of one's own never counts, whatever it says.
    """
    from jax._src import distributed

    if (distributed.global_state.num_processes or 1) == 1:
        return False
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return bool(_LOST.search(str(error)))
        error = error.__cause__ or error.__context__
    return False
