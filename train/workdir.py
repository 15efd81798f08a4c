"""The files that a run keeps in its workdir: whose it is, and its results."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from train import UserError
from train.files import (
    as_user_error,
    exists,
    parse_json,
    read_json,
    read_text,
    write_json,
)

# Where the data lies and how many devices are simulated may change from one
# start of a run to the next; it is still the same run.
MACHINE_FIELDS = (
    "data_dir",
    "cpu_devices",
    "checkpoint_every",
    "mesh",
    "microbatches",
    "profile",
    "seeds",
    "steps_per_dispatch",
)

# What every line of metrics.jsonl has, and every summary.json.
_EPOCH_KEYS = (
    *("epoch", "step", "train_loss", "train_accuracy", "test_loss"),
    *("test_accuracy", "images_per_second"),
)
_SUMMARY_KEYS = ("test_accuracy", "seconds")


def check_name(workdir: pathlib.Path) -> pathlib.Path:
    """Returns workdir with ~ expanded.

    Raises:
      UserError: its name would lead elsewhere than it says.
    """
    name = str(workdir)
    if re.match(r"\w+:/", name):
        raise UserError(
            f"--workdir={name} is an address. Mount the storage, and give the "
            "folder that it is mounted on."
        )
    if not name.isprintable():
        raise UserError(
            f"--workdir={name!r} has characters that cannot be printed; take "
            "another name."
        )
    try:
        path = workdir.expanduser()
    except RuntimeError as error:
        raise UserError(f"--workdir={name}: {error}") from error
    # Orbax takes the path for a pattern, matches nothing, or another run.
    found = re.search(r"[][*?\\]", str(path.absolute()))
    if found:
        raise UserError(
            f"--workdir={name}: {found[0]!r} in {path.absolute()} would be "
            "taken for a pattern of names. Take another --workdir, without any "
            r"of [ ] * ? \."
        )
    return path


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Creates the workdir, or checks that it belongs to this very run.

    A workdir in which nothing has been trained belongs to no run yet.

    Raises:
      UserError: it holds a run with another config, or one without any, or
        cannot be written.
    """
    workdir = check_name(workdir)
    path = workdir / "config.json"
    now = json.loads(config.to_json())
    there = exists(path)
    with as_user_error(f"--workdir={workdir}"):
        trained = _trained(workdir)
    if not there and any(workdir.glob("seed-*/config.json")):
        raise UserError(
            f"{workdir} holds a run of several seeds, each in a folder of its "
            "own. Take another --workdir, or the command of that run to go on "
            "with it."
        )
    if trained and not there:
        raise UserError(
            f"{workdir} holds a run ({trained}) without its config.json. Put "
            "that back, or take another --workdir."
        )
    if there:
        with with_advice("Put it back from a copy, or take another --workdir."):
            then = read_json(path)
        different = _different(now, then)
        if not different:
            return
        if trained:
            raise UserError(
                f"{workdir} holds another run: there {different} is "
                f"{then.get(different)!r}, here {now.get(different)!r}. Take "
                "another --workdir, or the config of that run to go on with it."
            )
    with as_user_error(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def _different(now: dict[str, Any], then: dict[str, Any]) -> str | None:
    for key in sorted({*now, *then} - {*MACHINE_FIELDS}):
        if now.get(key) != then.get(key):
            return key
    return None


def _trained(workdir: pathlib.Path) -> str | None:
    """Names something that only a run that has begun leaves."""
    for name in ("metrics.jsonl", "summary.json"):
        path = workdir / name
        if path.exists() and (not path.is_file() or path.stat().st_size):
            return name
    folder = workdir / "checkpoints"
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.isdecimal():
                return f"checkpoints/{path.name}"
    return None


def read_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of the epochs, in their order; none without a file.

    Raises:
      UserError: metrics.jsonl cannot be read, or is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not exists(path):
        return []
    with with_advice(
        "Put it back from a copy; if it is removed, a run goes on without."
    ):
        return _records(path)


def read_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what stands in summary.json; nothing until a run is finished.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    path = workdir / "summary.json"
    if not exists(path):
        return {}
    optional = ("average_test_accuracy", "devices", "epochs")
    with with_advice("Remove it: the same command writes it again."):
        summary = read_json(path)
        there = [name for name in optional if name in summary]
        _numbers(summary, (*_SUMMARY_KEYS, *there), str(path))
    return summary


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        record = parse_json(line, where)
        _numbers(record, _EPOCH_KEYS, where)
        if records and record["epoch"] <= records[-1]["epoch"]:
            raise UserError(
                f"{where} is damaged: epoch {record['epoch']} stands after "
                f"epoch {records[-1]['epoch']}."
            )
        records.append(record)
    return records


@contextlib.contextmanager
def with_advice(text: str) -> Iterator[None]:
    """Adds to a UserError what to do about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} {text}") from error


def _numbers(found: dict[str, Any], names: Iterable[str], where: str) -> None:
    for name in names:
        value = found.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(
                f"{where} is damaged: {name} must be a number; got {value!r}."
            )


def missing_epochs(records: list[dict[str, Any]], epochs: int) -> str:
    """Names the epochs up to a number that have no record; empty if all do."""
    there = {record["epoch"] for record in records}
    left = [n for n in range(1, int(epochs) + 1) if n not in there]
    if not left:
        return ""
    if len(left) == 1:
        return f"epoch {left[0]}"
    if left == list(range(left[0], left[-1] + 1)):
        return f"epochs {left[0]} to {left[-1]}"
    shown = ", ".join(map(str, left[:5])) + (", ..." if left[5:] else "")
    return f"epochs {shown}"
