"""Examines a model and prints a report."""

from __future__ import annotations

import collections
import dataclasses
import sys
import textwrap
from collections.abc import Collection, Iterable
from typing import Any, TextIO

import flax.linen as nn
import jax
import numpy as np

from jaxbn._model_call import ModelCall
from jaxbn.doctor import _checks, _warnings
from jaxbn.doctor._health import Health
from jaxbn.doctor._measure import gap, measure
from jaxbn.doctor._models import Layers, LinenModel, NnxModel, Parts
from jaxbn.doctor._table import LEGEND, format_table


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `examine`; print it, or read its fields.

    Attributes:
      layers: layers that normalize with their batch in training, in the order
        of the calls. Others are in warnings.
      gap: |output in training - output in inference| / |output in training| of
        the whole model, in the Euclidean norm over all batches; None if the
        outputs have no common structure.
      batches: number of batches read.
      warnings: one sentence per problem, with its layers and a remedy.
    """

    layers: list[Health]
    gap: float | None
    batches: int
    warnings: list[str]

    def __str__(self) -> str:
        lines = format_table(self.layers)
        lines += ["", *LEGEND, "", *_wrapped(self._about_the_output())]
        if not self.warnings:
            lines.append("No problem found.")
        for warning in self.warnings:
            lines += _wrapped(f"- {warning}", indent="  ")
        return "\n".join(lines)

    def _about_the_output(self) -> str:
        batches = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        if self.gap is None:
            return (
                f"Over {batches}. The outputs in training and inference have "
                "nothing in common; return a common part from call."
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
    """Prints a table of the batch norm layers, with warnings.

    Runs the model on batches in training mode and compares their statistics
    with the running ones. Supports layers of flax and jaxbn; changes nothing.

    The columns are explained below the table; `jaxbn.doctor.Health` has the
    formulas. Warnings also list layers that the call does not train, and other
    entries of batch_stats.

    Args:
      model: a flax.linen or flax.nnx module.
      variables: variables of a linen model; None for nnx.
      batches: training batches of the global training batch size; about twenty
        are enough.
      call: (model, batch, train) -> output, called with train True and False.
        None passes the batch to the model, and the mode to the argument or
        field that takes it, such as train or deterministic. A linen model is
        bound, as for `method` in flax; an nnx model is a copy, after train() or
        eval(). In training it may return more, such as (y, aux).
      rngs: for linen, a key or a dict of keys; the batch number is folded in.
        None creates a key for every stream.
      mutable: for linen, names of collections that the call creates.
      devices: number of devices in training; None is `jax.device_count()`.
      file: where to print; None is sys.stdout.
      quiet: prints nothing.

    Returns:
      Report.

    Raises:
      ValueError: there is no batch, none of its arrays has an axis of
        examples, there is no batch norm layer, none in training mode, or the
        model cannot be called without `call`.
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
            size = _examples(batch)
        found, squares = jax.device_get(examined.read(batch, len(parts)))
        parts.append({path: _to_float64(part) for path, part in found.items()})
        totals = None if squares is None else totals + squares
    if not parts:
        raise ValueError(
            "batches is empty; at least one is needed to examine the model."
        )
    healths = [
        _health(path, layer, [part[path] for part in parts], size, devices)
        for path, layer in layers.trained.items()
    ]
    examined_layers = [layer for layer in healths if layer.calls]
    others = {
        _checks.NO_VALUES: [layer.path for layer in healths if not layer.calls],
        _checks.IN_INFERENCE: layers.inferred,
        _checks.NOT_CALLED: layers.uncalled,
        _checks.UNKNOWN: layers.unknown,
    }
    report = Report(
        layers=examined_layers,
        gap=None if totals is None else _ratio(*totals),
        batches=len(parts),
        warnings=_warnings.warnings(examined_layers, devices, others=others),
    )
    if not quiet:
        print(report, file=file or sys.stdout)
    return report


def _examples(batch: Any) -> int:
    """Returns the length that most arrays have; other data may be among them."""
    lengths = [len(a) for a in jax.tree.leaves(batch) if np.ndim(a)]
    if not lengths:
        raise ValueError(
            "The batch has no array with an axis of examples, so that their "
            "number is unknown. Draw inputs such as latents outside of the "
            "model, and pass them as the batch."
        )
    return collections.Counter(lengths).most_common(1)[0][0]


def _wrapped(text: str, *, indent: str = "") -> list[str]:
    """Wraps at 80 columns; code, which has no spaces, is not broken."""
    return textwrap.wrap(
        text,
        80,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


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
    over, ids = layer.pop("normalize_over"), layer.pop("num_ids")
    members = 1
    if layer["axis_name"] is not None:
        members = len(groups[0]) if groups else group or devices
    examples = size * members / devices
    if over is not None:
        # Without axis_name, examples of other devices cannot be joined.
        alone = layer["axis_name"] is None
        examples = min(over, examples) if alone else over
    share = examples / size
    for name in ("running_mean", "running_var", "scale"):
        if layer[name] is not None:
            value = np.asarray(layer[name])
            wide = np.promote_types(value.dtype, np.float64)
            layer[name] = value.astype(wide).ravel()
    measured = measure(parts, layer["momentum"])
    measured["values"] *= share
    epsilon = layer["epsilon"]
    running = layer["running_mean"], layer["running_var"]
    exact = measured["mean"], measured["var"]
    return Health(
        path=path or "(the layer)",
        # Moments, and so the gap, are those of each id already.
        examples=examples / (ids or 1),
        gap=gap(parts, *running, epsilon),
        noise=gap(parts, *exact, epsilon) * share**-0.5,
        **measured,
        **layer,
    )


def _to_float64(part: Parts) -> Parts:
    """Casts to float64, or complex128."""

    def wide(a: Any) -> np.ndarray:
        a = np.asarray(a)
        b: np.ndarray = a.astype(np.promote_types(a.dtype, np.float64))
        return b

    widened: Parts = jax.tree.map(wide, part)
    return widened
