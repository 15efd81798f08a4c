"""The files of a workdir: its config and results."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from train import UserError
from train.files import (
    as_user_error,
    exists,
    none_to_nan,
    parse_json,
    read_json,
    read_text,
    write_json,
)

# Fields that may change when a run is resumed, such as the data directory or
# the number of simulated devices.
MACHINE_FIELDS = (
    "data_dir",
    "cpu_devices",
    "checkpoint_every",
    "data_on_device",
    "mesh",
    "microbatches",
    "profile",
    "num_seeds",
    "steps_per_dispatch",
)

# Required keys of each line of metrics.jsonl: its position in the run, and
# metrics, which are null if they are not finite.
_POSITION = ("epoch", "step")
_METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def check_name(workdir: pathlib.Path) -> pathlib.Path:
    """Returns workdir with ~ expanded.

    Raises:
      UserError: the path is a URL, not printable, or a glob pattern.
    """
    name = str(workdir)
    if re.match(r"\w+:/", name):
        raise UserError(
            f"--workdir={name} is a URL. Mount the storage, and use the path "
            "that it is mounted at."
        )
    if not name.isprintable():
        raise UserError(
            f"--workdir={name!r} contains unprintable characters; use another "
            "name."
        )
    try:
        path = workdir.expanduser()
    except RuntimeError as error:
        raise UserError(f"--workdir={name}: {error}") from error
    # Orbax treats the path as a glob pattern.
    found = re.search(r"[][*?\\]", str(path.absolute()))
    if found:
        raise UserError(
            f"--workdir={name}: {found[0]!r} in {path.absolute()} would be "
            "treated as a glob pattern. Use another --workdir, without any "
            r"of [ ] * ? \."
        )
    return path


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Creates the workdir, or checks that it belongs to the same run.

    A workdir without any training may be reused by another run.

    Raises:
      UserError: it holds a run with another config or without a config, or it
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
            f"{workdir} holds a run with several seeds. Use another --workdir, "
            "or the command of that run to resume it."
        )
    if trained and not there:
        raise UserError(
            f"{workdir} holds a run ({trained}) without its config.json. "
            "Restore it, or use another --workdir."
        )
    if there:
        with with_advice("Restore it from a backup, or use another --workdir."):
            then = read_json(path)
        different = _different(now, then)
        if not different:
            return
        if trained and different not in then:
            raise UserError(
                f"{workdir} holds a run of another version, whose config has "
                f"no {different}. Use another --workdir."
            )
        if trained:
            raise UserError(
                f"{workdir} holds another run, with {different}="
                f"{then.get(different)!r} instead of {now.get(different)!r}. "
                "Use another --workdir, or the config of that run to resume it."
            )
    with as_user_error(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def _different(now: dict[str, Any], then: dict[str, Any]) -> str | None:
    may_change = {*MACHINE_FIELDS}
    if now.get("norm_axes") not in ("all", "none"):
        # The mesh decides which examples share statistics.
        may_change.remove("mesh")
    for key in sorted({*now, *then} - may_change):
        if now.get(key) != then.get(key):
            return key
    return None


def _trained(workdir: pathlib.Path) -> str | None:
    """Returns a file that shows that training has started, or None."""
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
    """Returns the records of all epochs in order; empty without a file.

    Raises:
      UserError: metrics.jsonl cannot be read, or is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not exists(path):
        return []
    with with_advice(
        "Restore it from a backup, or remove it to continue without."
    ):
        return _records(path)


def read_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of summary.json; empty until the run finishes.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    path = workdir / "summary.json"
    if not exists(path):
        return {}
    optional = ("average_test_accuracy", "devices", "epochs", "seconds")
    with with_advice("Remove it, and rerun the same command to rewrite it."):
        summary = _with_nan(read_json(path))
        _check_numbers(summary, str(path), ("test_accuracy",), optional)
    return summary


def median_speed(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns images_per_second, the median of the epochs that have it."""
    key = "images_per_second"
    speeds = [record[key] for record in records if key in record]
    return {key: statistics.median(speeds)} if speeds else {}


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        record = parse_json(line, where)
        _check_numbers(record, where, _POSITION)
        record = _with_nan(record)
        _check_numbers(record, where, _METRICS, ("images_per_second",))
        if records and record["epoch"] <= records[-1]["epoch"]:
            raise UserError(
                f"{where} is damaged: epoch {record['epoch']} follows "
                f"epoch {records[-1]['epoch']}."
            )
        records.append(record)
    return records


@contextlib.contextmanager
def with_advice(text: str) -> Iterator[None]:
    """Appends advice to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} {text}") from error


def _with_nan(found: dict[str, Any]) -> dict[str, Any]:
    return {name: none_to_nan(value) for name, value in found.items()}


def _check_numbers(
    found: dict[str, Any],
    where: str,
    required: Iterable[str],
    optional: Iterable[str] = (),
) -> None:
    for name in (*required, *(name for name in optional if name in found)):
        value = found.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(
                f"{where} is damaged: {name} must be a number; got {value!r}."
            )


def missing_epochs(
    records: list[dict[str, Any]], expected: Iterable[int]
) -> str:
    """Lists expected epochs without a record, as text; empty without any."""
    there = {record["epoch"] for record in records}
    left = [n for n in expected if n not in there]
    if not left:
        return ""
    if len(left) == 1:
        return f"epoch {left[0]}"
    if left == list(range(left[0], left[-1] + 1)):
        return f"epochs {left[0]} to {left[-1]}"
    shown = ", ".join(map(str, left[:5])) + (", ..." if left[5:] else "")
    return f"epochs {shown}"
