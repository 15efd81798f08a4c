"""Reads batches, measures the layers, prints a table and what is wrong."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterable
from typing import Any, TextIO

import flax.linen as nn
import jax
import numpy as np

from jaxbn._call import ModelCall
from jaxbn.doctor import _findings
from jaxbn.doctor._health import Health, gap, measure
from jaxbn.doctor._models import Layers, LinenModel, NnxModel, Parts


@dataclasses.dataclass(frozen=True)
class Report:
    """What `examine` found; print it, or read its fields.

    Attributes:
      layers: that normalize with their batch in training, in the order of the
        calls. Others are in warnings.
      gap: |output in training - output in inference| / |output in training|,
        of the whole model, in the Euclidean norm over all batches; None where
        the two have no part of one structure.
      batches: that were read.
      warnings: sentences, each with the layers concerned and a remedy.
    """

    layers: list[Health]
    gap: float | None
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
        lines += ["", *_LEGEND, "", self._about_the_output()]
        if not self.warnings:
            lines.append("No problem found.")
        lines += [f"- {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _about_the_output(self) -> str:
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        if self.gap is None:
            return (
                f"Over {batches}. The model returns nothing in training that it "
                "returns in inference too; let call return what both have."
            )
        if not np.isfinite(self.gap):
            return (
                f"Over {batches} the model's output is not finite, in training "
                "or in inference."
            )
        size = f"{self.gap:.1%}"
        if self.gap > 100:
            size = f"{self.gap:.0e} times its size"
        return (
            f"Over {batches} the model's output differs by {size} between "
            "training and inference."
        )


def examine(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    *,
    call: ModelCall | None = None,
    rngs: Any = None,
    mutable: Collection[str] = (),
    devices: int | None = None,
    file: TextIO | None = None,
    quiet: bool = False,
) -> Report:
    """Prints a table of the batch norm layers, and what is wrong with them.

    Reads the batches in training mode, and compares their statistics with the
    running ones. Works on flax's layers and on jaxbn's; changes nothing.

    A row is a layer, and the table explains its columns;
    `jaxbn.doctor.Health` has the formulas. What else lies in batch_stats, and
    layers that the call does not train, are named below it.

    Args:
      model: of flax.linen or flax.nnx.
      variables: of a linen model; None for nnx.
      batches: of the training data, of the size that training has, all
        devices together; some twenty are enough.
      call: (model, batch, train) -> output, called with True and with False.
        None gives the model the batch, and its mode by the argument or field
        that has it, such as train or deterministic. A linen model is bound, as
        it is for `method` of flax; an nnx model is a copy, after train() or
        eval(). In training it may return more, such as (y, aux).
      rngs: of a linen model: a key, or a dict of them; the number of each
        batch is folded in. None makes one for every stream.
      mutable: of a linen model: names of collections that the call creates.
      devices: that training runs on; None takes those at hand.
      file: where the table goes; None is sys.stdout.
      quiet: prints nothing.

    Returns:
      Report.

    Raises:
      ValueError: there is no batch, no batch norm layer, or none in training
        mode; or how to call the model is not known.
    """
    devices = devices or jax.device_count()
    if isinstance(model, nn.Module):
        examined: LinenModel | NnxModel = LinenModel(
            model, variables, call, rngs, mutable
        )
    else:
        examined = NnxModel(model, call, rngs, mutable)
    parts: list[dict[str, Parts]] = []
    totals: Any = np.zeros(2)
    layers, size = Layers(), 0
    for batch in batches:
        if not parts:
            layers = examined.layers(batch)
            size = next(len(a) for a in jax.tree.leaves(batch) if np.ndim(a))
        found, squares = jax.device_get(examined.read(batch, len(parts)))
        parts.append({path: _to_float64(part) for path, part in found.items()})
        totals = None if squares is None else totals + squares
    if not parts:
        raise ValueError("There was no batch to examine the model with.")
    healths = [
        _health(path, layer, [part[path] for part in parts], size, devices)
        for path, layer in layers.trained.items()
    ]
    examined_layers = [layer for layer in healths if layer.calls]
    others = {
        _findings.NO_VALUES: [
            layer.path for layer in healths if not layer.calls
        ],
        _findings.IN_INFERENCE: layers.inferred,
        _findings.NOT_CALLED: layers.uncalled,
        _findings.UNKNOWN: layers.unknown,
    }
    report = Report(
        layers=examined_layers,
        gap=None if totals is None else _ratio(*totals),
        batches=len(parts),
        warnings=_findings.warnings(examined_layers, devices, others=others),
    )
    if not quiet:
        print(report, file=file or sys.stdout)
    return report


def _ratio(square: float, size: float) -> float:
    return float(np.sqrt(square / max(size, 1e-30)))


def _health(
    path: str,
    layer: dict[str, Any],
    parts: list[Parts],
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
    measured = measure(parts, layer["momentum"])
    measured["values"] *= examples / size
    epsilon = layer["epsilon"]
    running = layer["running_mean"], layer["running_var"]
    exact = measured["mean"], measured["var"]
    return Health(
        path=path or "(the layer)",
        examples=examples,
        gap=gap(parts, *running, epsilon),
        noise=gap(parts, *exact, epsilon) * (size / examples) ** 0.5,
        **measured,
        **layer,
    )


_HEADER = [
    *("layer", "kind", "sync", "over", "calls", "channels"),
    *("z", "KL", "gap", "noise", "dead", "<eps", ">1e6", "scale0", "std"),
]
_LEGEND = [
    "sync: mesh axis. over: examples normalized together. calls: in a batch.",
    "z, KL: running statistics against those of the data, worst channel: "
    "distance of",
    "the means in standard deviations, divergence of normal distributions in "
    "nats.",
    "gap: change of the layer's output from training to inference; noise: what "
    "is left",
    "of it with exact statistics; both root mean square, in standard "
    "deviations.",
    "dead, <eps, >1e6, scale0: channels that hold one value, whose variance is "
    "below",
    "epsilon, that are beyond 1e6, whose scale is near zero. std: of the "
    "input.",
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


def _to_float64(part: Parts) -> Parts:
    """In float64, or wider where complex."""

    def wide(a: Any) -> np.ndarray:
        a = np.asarray(a)
        b: np.ndarray = a.astype(np.promote_types(a.dtype, np.float64))
        return b

    widened: Parts = jax.tree.map(wide, part)
    return widened
