"""The table that the doctor prints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxbn.doctor._health import Health

_HEADER = [
    *("layer", "kind", "sync", "over", "calls", "channels"),
    *("z", "KL", "gap", "noise", "dead", "<eps", ">1e6", "scale0", "std"),
]
LEGEND = [
    "sync: mesh axis. over: examples normalized together. calls: per batch.",
    "z, KL: running statistics against those of the data, worst channel: "
    "distance of",
    "the means in standard deviations, KL divergence of normal distributions "
    "in nats.",
    "gap: difference of the outputs in training and inference; noise: the gap "
    "with",
    "exact running statistics; both root mean square, in standard deviations.",
    "dead, <eps, >1e6, scale0: channels that are constant, have a variance "
    "below epsilon,",
    "exceed 1e6, have a scale near zero. std: of the input.",
]


def _row(layer: Health) -> list[str]:
    def worst(values: np.ndarray) -> str:
        return f"{np.max(values, initial=0):.2g}"

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
        f"{layer.input_std:.2g}",
    ]


def format_table(layers: Sequence[Health]) -> list[str]:
    """Returns one line per layer, below a header."""
    rows = [_HEADER, *map(_row, layers)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
