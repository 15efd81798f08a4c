"""The processes of a run: what they agree on, and how they fail together."""

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

# Within so many seconds all have to be there.
STARTUP_TIMEOUT = 50
# The watchdog ends a run that waits too long; this is only longer.
_NO_TIMEOUT = 7 * 24 * 3600


class Agreed(UserError):
    """One that all processes raise at the same place."""


_ROOT = pathlib.Path(__file__).resolve().parent.parent
_numbers = itertools.count()


def exchange(text: str, *, seconds: float = _NO_TIMEOUT) -> list[str]:
    """Returns what each process gives here, by their index.

    By way of the coordinator, not of the devices: it works before they do.
    """
    if jax.process_count() == 1:
        return [text]
    key = _give(text)
    return [_take(key, i, seconds) for i in range(jax.process_count())]


def _give(text: str) -> str:
    """Hands text to the others; returns what they ask for it by."""
    from jax._src import distributed  # its client is not public

    state, key = distributed.global_state, f"train/{next(_numbers)}"
    state.client.key_value_set(f"{key}/{state.process_id}", text)
    return key


def _take(key: str, process: int, seconds: float) -> str:
    from jax._src import distributed

    try:
        return distributed.global_state.client.blocking_key_value_get(
            f"{key}/{process}", int(1000 * seconds)
        )
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UserError(
            f"Process {process} did not answer within {seconds:g} s: it "
            "hangs, or was started with another program."
        ) from error


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


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Adds up integers over the processes, exactly."""
    if jax.process_count() == 1:
        return values
    # As 32 bits twice: without x64 wider integers would be cut.
    halves = np.stack([values & 0xFFFF, values >> 16]).astype(np.int32)
    low, high = (
        multihost_utils.process_allgather(halves).astype(np.int64).sum(0)
    )
    return low + (high << 16)


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
    given = _give(json.dumps(own))
    first = json.loads(_take(given, 0, STARTUP_TIMEOUT))
    # So many have met, whatever this process was told.
    others = range(1, first["num_processes"])
    every = [
        first,
        *(json.loads(_take(given, i, STARTUP_TIMEOUT)) for i in others),
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
        said = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(said):
            return True
        # On some paths JAX raises what the collectives report as ValueError.
        if isinstance(error, ValueError) and "Gloo" in said:
            return True
        error = error.__cause__ or error.__context__
    return False
