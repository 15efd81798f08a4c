"""Markdown of what the benchmarks measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tests.bench import measure
from tests.bench.layers import BASE


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ranged(values: Sequence[float], digits: int = 2) -> str:
    """Formats a median with its quartiles."""
    median, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({low} to {high})"


def number(value: float) -> str:
    """Formats a statistic or an error with three digits."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return f"{value:.3g}"


def speed(rows: list[dict]) -> str:
    """Returns times, ratios, shares of bandwidth and bytes moved."""
    text = []
    for mode in measure.MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        names = list(chosen[0]["ratio"])
        others = [name for name in names if name != BASE]
        text.append(
            f"### {mode.capitalize()}, train mode: time over that of {BASE}\n\n"
            "Median and quartiles of the ratio within a round; below 1 is "
            f"faster.\n\n"
            + table(
                ["x", f"{BASE}, ms", *others],
                [
                    [_input(row), ranged(row["ms"][BASE])]
                    + [ranged(row["ratio"][name]) for name in others]
                    for row in chosen
                ],
            )
        )
        floor = measure.FLOOR[mode]
        text.append(
            f"### {mode.capitalize()}: share of the copy bandwidth\n\n"
            f"{floor} passes over x at the speed of a copy (2 passes) in the "
            "same round, over the time taken.\n\n"
            + table(
                ["x", "copy, GB/s", *names],
                [
                    [_input(row), ranged(row["copy GB/s"], 1)]
                    + [
                        f"{row['share of copy bandwidth'][name][0]:.0%}"
                        for name in names
                    ]
                    for row in chosen
                ],
            )
        )
        text.append(
            f"### {mode.capitalize()}: bytes accessed, in passes over x\n\n"
            f"As XLA counts them in the compiled program. Floor: {floor}.\n\n"
            + table(
                ["x", *names],
                [
                    [_input(row)]
                    + [_passes(row["passes"][name]) for name in names]
                    for row in chosen
                ],
            )
        )
    return "\n".join(text)


def _input(row: dict) -> str:
    return f"{'x'.join(map(str, row['shape']))} {row['dtype']}"


def _passes(count: float | None) -> str:
    return "unknown" if count is None else f"{count:.1f}"


def memory(result: dict) -> str:
    """Returns saved arrays and temporary memory, in units of the input."""
    shape = "x".join(map(str, result["shape"]))
    dtypes = list(next(iter(result["temp"].values())))

    def saved(by_dtype: dict[str, float]) -> str:
        total = sum(by_dtype.values())
        return f"{total:.1f} ({' + '.join(by_dtype)})"

    return (
        "### Memory, in units of one input\n\n"
        "Saved: arrays that jax.vjp keeps for the backward pass, with their "
        "dtype. Temporary: of the compiled gradient of six conv-norm-relu at "
        f"{shape}, where XLA may recompute instead.\n\n"
        + table(
            ["norm"]
            + [f"saved, {dtype} input" for dtype in dtypes]
            + [f"temporary, {dtype}" for dtype in dtypes],
            [
                [name]
                + [saved(result["saved"][name][dtype]) for dtype in dtypes]
                + [f"{result['temp'][name][dtype]:.1f}" for dtype in dtypes]
                for name in result["temp"]
            ],
        )
    )


def policy(result: dict) -> str:
    """Returns memory and time under policies of recomputation."""
    rows = result["rows"]
    base = next(iter(rows.values()))
    shape = "x".join(map(str, result["shape"]))

    def size(row: dict, key: str) -> str:
        change = "" if row is base else f" ({row[key] / base[key] - 1:+.0%})"
        return f"{row[key] / 2**20:.0f}{change}"

    return (
        "### Memory of a gradient under jax.checkpoint, MiB\n\n"
        f"Bottlenecks {result['stages']}, first width {result['width']}, "
        f"images {shape}, float32. Kept: by jax.vjp, besides arguments. "
        "Temporary: of the compiled gradient. Time: over the first row's "
        "within a round.\n\n"
        + table(
            ["norm", "kept", "temporary", "ms", "time"],
            [
                [name, size(row, "kept"), size(row, "temp")]
                + [ranged(row["ms"], 0), ranged(row["ratio"])]
                for name, row in rows.items()
            ],
        )
    )


def training(result: dict) -> str:
    """Returns images a second, and speed over that with flax's norm."""
    rows = result["rows"]
    names = list(next(iter(rows.values()))["images/s"])
    return (
        "### Whole training steps: images a second, and over flax's\n\n"
        f"{result['dtype']}, {result['devices']} devices; the second number is "
        "the ratio within a round, above 1 is faster.\n\n"
        + table(
            ["network", "batch", *names],
            [
                [name, str(row["batch"])]
                + [
                    f"{row['images/s'][n][0]:,.0f}; {ranged(row['speed'][n])}"
                    for n in names
                ]
                for name, row in rows.items()
            ],
        )
    )


def compile_times(result: dict) -> str:
    """Returns seconds until a training step runs."""
    parts = "trace and lower", "compile"
    return (
        f"### Seconds to a compiled training step of ResNet-{result['depth']}"
        f"\n\nMedian and quartiles of {result['rounds']} interleaved runs, "
        "caches cleared.\n\n"
        + table(
            ["norm", *parts, "lines of StableHLO"],
            [
                [norm]
                + [ranged(result[part][norm]) for part in parts]
                + [str(lines)]
                for norm, lines in result["lines of StableHLO"].items()
            ],
        )
    )


def stability(result: dict) -> str:
    """Returns relative errors of the variance."""
    one, eight = result["one"], result["eight"]
    offsets = list(eight)

    def cell(got: dict[str, float]) -> str:
        text = number(got["error"])
        if got["least"] < 0:
            text += f", negative, {got['nan']:.0%} of y NaN"
        return text

    return (
        "### Relative error of the variance of N(m, 1), float32\n\n"
        "The worst of eight features, against float64.\n\n"
        + table(
            ["one device", *(f"m = {o}" for o in offsets)],
            [
                [name, *(cell(got[o]) for o in offsets)]
                for name, got in one.items()
            ],
        )
        + "\nOver eight devices. A module sums about its running mean: 0 at "
        "first, 0.63 m after 100 steps of momentum 0.99, at last near m.\n\n"
        + table(
            ["eight devices", *(f"m = {o}" for o in offsets)],
            [
                [key, *(number(eight[o][key]) for o in offsets)]
                for key in eight[offsets[0]]
            ],
        )
    )


def sync(result: dict) -> str:
    """Returns what happens over eight devices."""

    def statistics(title: str, key: str) -> str:
        found = result[key]
        first = next(iter(found.values()))
        rows = [
            [name, number(got["mean"]), number(got["var"])]
            for name, got in found.items()
        ]
        last = ["truth", number(first["true_mean"]), number(first["true_var"])]
        return f"### {title}\n\n" + table(
            ["norm", "mean", "variance"], [*rows, last]
        )

    steps = next(iter(result["empty"].values()))["steps"]
    drifted = result["drifted"]
    return "\n".join(
        [
            statistics(
                "Valid rows per device 4, 4, 4, 4, 4, 4, 4, 1", "uneven"
            ),
            statistics(
                f"Running statistics {steps:,} clean steps after one batch "
                "with an empty device",
                "empty",
            ),
            "A layer that is not listed takes no mask.\n",
            "### All-reduces in the compiled program, 64 features\n\n"
            + table(
                ["norm", "forward", "forward+backward", "floats in each"],
                [
                    [name, str(len(ahead)), str(len(both))]
                    + [", ".join(map(str, both))]
                    for name, (ahead, both) in result["all_reduces"].items()
                ],
            ),
            "### Variance of eight replicas whose means drifted\n\n"
            + table(
                ["variances averaged", "jaxbn.merge", "truth"],
                [[number(v) for v in drifted.values()]],
            ),
        ]
    )


TABLES = {
    "speed": speed,
    "memory": memory,
    "policy": policy,
    "training": training,
    "compile": compile_times,
    "stability": stability,
    "sync": sync,
}
