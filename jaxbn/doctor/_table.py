"""The table that the doctor prints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxbn.doctor._health import Health

# Two tables: one of all columns would be wider than a terminal.
_LAYER = ["layer", "kind", "sync", "over", "calls", "channels", "std"]
_HEALTH = [
    *("layer", "z", "KL", "gap", "noise"),
    *("dead", "<eps", ">1e6", "scale0"),
]
LEGEND = [
    "sync: mesh axis. over: examples normalized together. calls: per batch.",
    "channels: number of them. std: standard deviation of the input.",
    "z, KL: running statistics against those of the data, worst channel: "
    "distance of",
    "the means in standard deviations, KL divergence of normal distributions "
    "in nats.",
    "gap: difference of the outputs in training and inference; noise: the gap "
    "with",
    "exact running statistics; both root mean square, in standard deviations.",
    "dead, <eps, >1e6, scale0: channels that are constant, have a variance "
    "below",
    "epsilon, exceed 1e6, have a scale near zero.",
]


def _layer_row(layer: Health) -> list[str]:
    axis = layer.axis_name
    if isinstance(axis, tuple):
        axis = "+".join(map(str, axis))
    return [
        layer.path,
        layer.kind,
        "no" if axis is None else str(axis),
        f"{layer.examples:g}",
        f"{layer.calls:.3g}",
        str(layer.mean.size),
        f"{layer.input_std:.2g}",
    ]


def _health_row(layer: Health) -> list[str]:
    def worst(values: np.ndarray) -> str:
        return f"{np.max(values, initial=0):.2g}"

    return [
        layer.path,
        worst(layer.z),
        worst(layer.kl),
        f"{layer.gap:.2g}",
        f"{layer.noise:.2g}",
        *(
            str(int(channels.sum()))
            for channels in (
                layer.dead,
                layer.below_epsilon,
                layer.exploding,
                layer.zero_scale,
            )
        ),
    ]


def format_table(layers: Sequence[Health]) -> list[str]:
    """Returns two tables with a line per layer, below a header."""
    return [
        *_aligned([_LAYER, *map(_layer_row, layers)], texts=2),
        "",
        *_aligned([_HEALTH, *map(_health_row, layers)], texts=1),
    ]


def _aligned(rows: list[list[str]], *, texts: int) -> list[str]:
    """Aligns columns: the first, texts, to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
