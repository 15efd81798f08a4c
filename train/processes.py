"""Communication between processes, and errors that all of them raise."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from train import UserError

# Seconds within which all processes must start.
STARTUP_TIMEOUT = 50
# Longer than the watchdog, which ends a run that waits too long.
_NO_TIMEOUT = 7 * 24 * 3600


class SharedUserError(UserError):
    """A UserError that all processes raise together."""


_ROOT = pathlib.Path(__file__).resolve().parent.parent
_numbers = itertools.count()


def all_gather(text: str, *, seconds: float = _NO_TIMEOUT) -> list[str]:
    """All-gathers a string over processes, ordered by process index.

    Uses the coordinator instead of devices, so it works before they do.
    """
    if jax.process_count() == 1:
        return [text]
    key = _publish(text)
    return [_receive(key, i, seconds) for i in range(jax.process_count())]


def _publish(text: str) -> str:
    """Publishes text to the other processes; returns its key."""
    from jax._src import distributed  # its client is not public

    state, key = distributed.global_state, f"train/{next(_numbers)}"
    state.client.key_value_set(f"{key}/{state.process_id}", text)
    return key


def _receive(key: str, process: int, seconds: float) -> str:
    from jax._src import distributed

    try:
        return distributed.global_state.client.blocking_key_value_get(
            f"{key}/{process}", int(1000 * seconds)
        )
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(
            f"Process {process} did not respond within {seconds:g} s: it "
            "hangs, or runs a different program."
        ) from error


@contextlib.contextmanager
def sync_errors() -> Iterator[None]:
    """Context manager that raises a UserError of one process in all of them.

    All processes must enter it; its body must not wait for other processes.

    Raises:
      SharedUserError: a process raised UserError in the body.
    """
    own, wrong = None, ""
    try:
        yield
    except UserError as error:
        own, wrong = error, str(error)
    if own is not None and jax.process_count() == 1:
        raise own
    for said in all_gather(wrong):
        if said:
            raise SharedUserError(said) from own


def broadcast_from_main(make: Callable[[], Any]) -> Any:
    """Calls make in the main process; returns its JSON value in all."""
    found = "null"
    with sync_errors():
        if jax.process_index() == 0:
            found = json.dumps(make())
    return json.loads(all_gather(found)[0])


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Sums integers over processes, exactly."""
    if jax.process_count() == 1:
        return values
    # Two 32-bit halves: without x64, wider integers would be truncated.
    halves = np.stack([values & 0xFFFF, values >> 16]).astype(np.int32)
    low, high = (
        multihost_utils.process_allgather(halves).astype(np.int64).sum(0)
    )
    return low + (high << 16)


def check_consistent(config: ConfigDict, versions: dict[str, str]) -> None:
    """Checks that all processes run the same program, and connects devices.

    Otherwise they would deadlock.

    Raises:
      SharedUserError: the processes differ, with the differences.
    """
    from jax._src import distributed

    if distributed.global_state.client is None:
        return
    own = {
        **json.loads(config.to_json()),
        **{f"the version of {name}": v for name, v in versions.items()},
        "num_processes": distributed.global_state.num_processes,
        "the code in jaxbn, train and configs": _source_digest(),
    }
    del own["data_dir"]  # may differ between hosts
    given = _publish(json.dumps(own))
    first = json.loads(_receive(given, 0, STARTUP_TIMEOUT))
    # Trust the number of process 0 over the one given here.
    others = range(1, first["num_processes"])
    every = [
        first,
        *(json.loads(_receive(given, i, STARTUP_TIMEOUT)) for i in others),
    ]
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
        raise SharedUserError(
            f"The processes differ: {listed}"
            f"{f'; and {more} more' if more > 0 else ''}. Run the same command "
            "on all hosts, with the same code and packages."
        )
    # Connect now: the libraries of collectives wait only 30 s for each other,
    # which a long compilation on one host would exceed.
    multihost_utils.sync_global_devices("start")


def _source_digest() -> str:
    digest = hashlib.sha256()
    for folder in ("configs", "jaxbn", "train"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# Errors of collectives and the coordinator if a peer is lost.
_LOST = re.compile(
    "closed by peer|reset by peer|[Bb]roken pipe|gloo/transport|Gloo|"
    "coordination service|heartbeat|[Bb]arrier|UNAVAILABLE|DEADLINE_EXCEEDED"
)


def is_lost(error: BaseException | None) -> bool:
    """Whether JAX raised this error because another process was lost.

    Only errors of JAX count, not those of file systems or of this program.
    """
    from jax._src import distributed

    if (distributed.global_state.num_processes or 1) == 1:
        return False
    while error is not None:
        said = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(said):
            return True
        # On some paths JAX raises errors of collectives as ValueError.
        if isinstance(error, ValueError) and "Gloo" in said:
            return True
        error = error.__cause__ or error.__context__
    return False
