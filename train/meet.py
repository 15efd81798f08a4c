"""How the processes of a run meet."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import jax

from train import UserError
from train.processes import MEET

# A process that is gone is noticed after this many seconds; JAX waits 100.
HEARTBEAT = 15
# So long a process that has finished, or failed, waits for the others.
SHUTDOWN = 10
_TIMEOUTS = {
    "heartbeat_timeout_seconds": HEARTBEAT,
    "shutdown_timeout_seconds": SHUTDOWN,
}


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
