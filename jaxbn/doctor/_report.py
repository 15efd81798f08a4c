"""Reads batches, measures the layers, prints a table and what is wrong."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import flax.linen as nn
import jax
import numpy as np

from jaxbn._moments import Moments
from jaxbn.doctor import _symptoms
from jaxbn.doctor._patients import Caller, Linen, Nnx
from jaxbn.doctor._symptoms import Health


@dataclasses.dataclass(frozen=True)
class Report:
    """What `examine` found; print it, or read its fields.

    Attributes:
      layers: in the order of the calls.
      gap: |output in training - output in inference| / |output in training|,
        of the whole model, in the Euclidean norm over all batches.
      batches: that were read.
      warnings: sentences, each with the layers concerned and a remedy.
    """

    layers: list[Health]
    gap: float
    batches: int
    warnings: list[str]

    def __str__(self) -> str:
        rows = [_HEADER, *map(_row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        lines.append(
            f"Over {batches} the model's output differs by {self.gap:.1%} "
            "between training and inference."
        )
        if not self.warnings:
            lines.append("Nothing to complain of.")
        lines += [f"- {warning}" for warning in self.warnings]
        return "\n".join(lines)


def examine(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    *,
    call: Caller | None = None,
    devices: int | None = None,
    file: TextIO | None = sys.stdout,
) -> Report:
    """Prints a table of the batch norm layers, and what is wrong with them.

    Reads the batches in training mode, and compares their statistics with the
    running ones. Works on flax's layers and on jaxbn's; changes nothing.

    A row is a layer. Columns: `sync`, the mesh axis, or "no"; `over`, the
    examples that are normalized together; `z` and `KL`, the running statistics
    against those of the data, the worst channel; `gap`, what the output would
    change by between training and inference, and `noise`, what is left of that
    with exact statistics, in standard deviations of the output; `dead`,
    `wild` and `shut`, channels that hold one value, that are beyond 1e6, and
    whose scale is near zero; `std` of the input. `jaxbn.doctor.Health` has
    the formulas.

    Args:
      model: of flax.linen or flax.nnx.
      variables: of a linen model; None for nnx.
      batches: of the training data, of the size that training has, all
        devices together; some twenty are enough.
      call: (model, batch, train) -> output. None calls a linen model with the
        batch and the argument that says its mode, and an nnx model with the
        batch after train() or eval().
      devices: that training runs on; None takes those at hand.
      file: where the table goes; None prints nothing.

    Returns:
      Report.

    Raises:
      ValueError: there is no batch or no batch norm layer, or the argument
        that says the mode is not known.
    """
    devices = devices or jax.device_count()
    if isinstance(model, nn.Module):
        patient: Linen | Nnx = Linen(model, variables, call)
    else:
        patient = Nnx(model, call)
    moments: list[dict[str, Moments]] = []
    squares, layers, size = np.zeros(2), {}, 0
    for batch in batches:
        if not moments:
            layers = patient.layers(batch)
            size = jax.tree.leaves(batch)[0].shape[0]
        if not layers:
            raise ValueError(
                "There is no batch norm layer in this model, neither flax's "
                "nor jaxbn's."
            )
        found, squared = jax.device_get(patient.read(batch))
        moments.append({path: _wide(part) for path, part in found.items()})
        squares += squared
    if not moments:
        raise ValueError("There was no batch to examine the model with.")
    healths = [
        _health(path, layer, [part[path] for part in moments], size, devices)
        for path, layer in layers.items()
    ]
    report = Report(
        layers=healths,
        gap=float(np.sqrt(squares[0] / max(squares[1], 1e-30))),
        batches=len(moments),
        warnings=_symptoms.warnings(healths, devices),
    )
    if file is not None:
        print(report, file=file)
    return report


def _health(
    path: str,
    layer: dict[str, Any],
    parts: list[Moments],
    size: int,
    devices: int,
) -> Health:
    layer = dict(layer)
    group, groups = layer.pop("group_size"), layer.pop("axis_index_groups")
    over = layer.pop("normalize_over")
    examples = size / devices
    if layer["axis_name"] is not None:
        members = len(groups[0]) if groups else group or devices
        examples = over or size * members / devices
    for name in ("running_mean", "running_var", "scale"):
        if layer[name] is not None:
            value = np.asarray(layer[name])
            wide = np.promote_types(value.dtype, np.float64)
            layer[name] = value.astype(wide).ravel()
    measured = _symptoms.measure(parts, layer["momentum"])
    epsilon = layer["epsilon"]
    running = layer["running_mean"], layer["running_var"]
    exact = measured["mean"], measured["var"]
    return Health(
        path=path or "(the layer)",
        examples=examples,
        gap=_symptoms.gap(parts, *running, epsilon),
        noise=_symptoms.gap(parts, *exact, epsilon) * (size / examples) ** 0.5,
        **measured,
        **layer,
    )


_HEADER = ["layer", "kind", "sync", "over", "channels", "z", "KL", "gap"] + [
    *("noise", "dead", "wild", "shut", "std")
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
        str(layer.mean.size),
        worst(layer.z),
        worst(layer.kl),
        f"{layer.gap:.2g}",
        f"{layer.noise:.2g}",
        *(str(int(a.sum())) for a in (layer.dead, layer.exploding)),
        str(int(layer.closed.sum())),
        f"{layer.input_std:.2g}",
    ]


def _wide(part: Moments) -> Moments:
    """In float64, or wider where complex, with a count for every channel."""
    count, mean, m2 = map(np.asarray, part)
    count = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    count = np.broadcast_to(count, mean.shape).astype(np.float64)
    mean = mean.astype(np.promote_types(mean.dtype, np.float64))
    fields: Any = (count, mean, m2.astype(np.float64))
    return Moments(*fields)
