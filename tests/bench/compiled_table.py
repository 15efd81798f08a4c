"""Tables of what was read off compiled programs."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from tests.bench import tables

GIB = 2**30


def header() -> str:
    """Returns what compiled the programs."""
    found = []
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "Compiled ahead of time, not run: " + ", ".join(found)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a program on one target, with a row for each norm."""
    first = rows[0]
    text = f"### {first['target']}: {first['program']}\n\n"
    known = [row for row in rows if "error" not in row]
    base = next((row for row in known if row["norm"] == "flax"), None)
    columns = {
        "cycles, M": lambda row: row["ordinary"]["cycles"] / 1e6,
        "GB": lambda row: row["ordinary"]["bytes"] / 1e9,
        "GB, XLA": lambda row: (row["xla_bytes"] or 0) / 1e9,
        "temporary GiB": lambda row: row["temporary_bytes"] / GIB,
        "kernels": lambda row: row["ordinary"]["kernels"],
        "sums alone": lambda row: row["sums_alone"]["kernels"],
    }
    columns = {
        name: read for name, read in columns.items() if any(map(read, known))
    }
    lines = [
        [row["norm"]]
        + [_cell(read, row, base) for read in columns.values()]
        + [_collectives(row["ordinary"]), _apart(row)]
        for row in known
    ]
    if known:
        head = ["norm", *columns, "collectives", "apart"]
        text += tables.table(head, lines)
    for row in known:
        if first["program"].startswith("slice"):
            text += f"\n{row['norm']}: {_traffic(row['traffic'])}\n"
    for row in rows:
        if "error" in row:
            text += f"\n{row['norm']}: {row['error']}\n"
    return text


def _cell(read: Any, row: dict[str, Any], base: dict[str, Any] | None) -> str:
    value = read(row)
    text = str(value) if isinstance(value, int) else f"{value:.3f}"
    if base is None or row is base or not read(base):
        return text
    return f"{text} ({value / read(base):.3f})"


def _collectives(work: dict[str, Any]) -> str:
    found = work["collectives"].items()
    return ", ".join(f"{count} {kind}" for kind, count in found) or "none"


def _apart(row: dict[str, Any]) -> str:
    work = row["apart"]
    if not row["decisions"]:
        return "nothing"
    parts = [
        f"decisions: {row['decisions']}",
        f"{work['kernels']} kernels",
        f"{work['bytes'] / 1e9:.3f} GB",
    ]
    if work["cycles"]:
        parts.append(f"{work['cycles'] / 1e6:.2f} M cycles")
    return ", ".join([*parts, f"collectives: {_collectives(work)}"])


def _traffic(found: dict[str, dict[str, dict[int, int]]]) -> str:
    return "; ".join(
        f"{kind}, {part}, {sum(sizes.values())}: "
        + ", ".join(
            f"{count} of {size:,} bytes"
            for size, count in sorted(sizes.items())
        )
        for kind, parts in found.items()
        for part, sizes in parts.items()
    )
