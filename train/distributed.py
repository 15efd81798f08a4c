"""Initializes jax.distributed, with errors that users can act on."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from typing import Any

import jax

from train import UserError
from train.processes import STARTUP_TIMEOUT

# Seconds until a lost process is noticed; the default of JAX is 100.
HEARTBEAT = 15
# Seconds that a finished or failed process waits for the others.
SHUTDOWN = 10
_TIMEOUTS = {
    "heartbeat_timeout_seconds": HEARTBEAT,
    "shutdown_timeout_seconds": SHUTDOWN,
}


def initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    before_connecting: Callable[[int], Any] = lambda _: None,
) -> None:
    """Connects the processes of a run; call before the first use of a device.

    Without arguments JAX detects SLURM, Open MPI, Kubernetes or Cloud TPU;
    without any of them the run has a single process.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: index of this process.
      before_connecting: called with process_id before several processes
        connect.

    Raises:
      UserError: only some of the arguments are given, or the processes cannot
        connect.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id must be set "
            "together; "
            f"{' and '.join('--' + name for name in missing)} is missing."
        )
    options: dict[str, Any] = {}
    if missing:
        found = _detect_cluster()
        if found is None:
            return
        coordinator, num_processes, process_id, devices = found
        options["local_device_ids"] = devices
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to "
            f"{num_processes - 1}, num_processes - 1."
        )
    host, port = _parse_address(coordinator)
    limit = time.monotonic() + STARTUP_TIMEOUT
    if process_id == 0:
        address = _bind_address(host, port, everywhere=bool(missing))
        if not missing:
            options["coordinator_bind_address"] = address
    else:
        _wait_for_coordinator(host, port, limit)
    before_connecting(process_id)
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
            f"Process {process_id} of {num_processes} could not connect to "
            f"the others at {coordinator}: {' '.join(str(error).split())[:300]}"
        ) from error


def _detect_cluster() -> tuple[str, int, int, Any] | None:
    """Returns the cluster that JAX detects from the environment."""
    from jax._src import clusters  # there is no public API for the address

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, STARTUP_TIMEOUT
    )
    return None if None in found[:3] else found


def _parse_address(coordinator: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:\s]+):(\d{1,5})", coordinator)
    if not found or not 0 < int(found[2]) < 2**16:
        raise UserError(
            f"--coordinator={coordinator} must be HOST:PORT of process 0, such "
            "as 10.0.0.1:9876."
        )
    return found[1].strip("[]"), int(found[2])


def _bind_address(host: str, port: int, *, everywhere: bool) -> str:
    """Returns the address to bind; JAX crashes if it cannot be bound.

    Args:
      host: host of the coordinator.
      port: port of the coordinator.
      everywhere: tries all addresses of this host, as JAX does if the
        environment names the coordinator: its name may resolve to the loopback
        here, and to another address elsewhere.

    Raises:
      UserError: the address cannot be bound.
    """
    try:
        family, *_, (address, *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as one:
            # Connections of an earlier run may still be closing.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("" if everywhere else address, port))
    except (OSError, UnicodeError) as error:
        reason = (
            getattr(error, "strerror", None) or "it is not a valid host name"
        )
        raise UserError(
            f"Process 0 cannot listen on --coordinator={host}:{port}: "
            f"{reason}. Use an address of its host and a free port."
        ) from error
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _wait_for_coordinator(host: str, port: int, limit: float) -> None:
    """Blocks until process 0 listens."""
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except (OSError, UnicodeError) as error:
            if time.monotonic() < limit:
                time.sleep(0.2)
                continue
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"Nothing listens on --coordinator={host}:{port} after "
                f"{STARTUP_TIMEOUT} s ({reason}). "
                "Start process 0 there within that time, or correct the "
                "address."
            ) from error
        return
