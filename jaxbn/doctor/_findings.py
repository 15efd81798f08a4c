"""What is wrong with batch norm layers, in words, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.doctor._health import Health

# Below this many examples the noise of batch statistics costs accuracy.
# Wu and He (2018), Group Normalization, figure 1.
FEW_EXAMPLES = 16

# Statistics of the calls of a layer this far apart, in standard deviations.
FAR_APART = 0.2


class Finding(NamedTuple):
    """Findings that differ in their figures alone are reported as one.

    Attributes:
      cause: what is the matter, with a {} for each figure.
      remedy: what to do.
      figures: pairs of a number and its format, such as ".0%".
    """

    cause: str
    remedy: str
    figures: tuple[tuple[float, str], ...] = ()


def warnings(
    layers: Sequence[Health],
    devices: int,
    *,
    others: Mapping[Finding, Sequence[str]],
) -> list[str]:
    """Returns what is wrong, in words, with the remedy; one entry a cause.

    Args:
      layers: that were examined.
      devices: that training runs on.
      others: what is known of layers that were not, and their paths.
    """
    found: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for layer in layers:
        for finding in _of_layer(layer, devices):
            entries = found.setdefault(finding[:2], [])
            entries.append((layer.path, finding))
    for finding, paths in others.items():
        for path in paths:
            entries = found.setdefault(finding[:2], [])
            entries.append((path, finding))
    every = [layer.path for layer in layers]
    return [
        f"{_listed([path for path, _ in entries], every)} "
        f"{cause.format(*_ranges([f for _, f in entries]))} {remedy}"
        for (cause, remedy), entries in found.items()
    ]


IN_INFERENCE = Finding(
    "runs in inference mode while the model trains, so that its statistics do "
    "not move.",
    "Not examined. Right for a frozen layer; else the mode does not reach it.",
)
NOT_CALLED = Finding(
    "is not called in training, so that its statistics do not move.",
    "Not examined. Right where training takes another branch.",
)
UNKNOWN = Finding(
    "has a mean and a var in batch_stats, where no batch norm layer of flax "
    "or jaxbn is called in training.",
    "Not examined. Right for statistics of another kind, or where training "
    "takes another branch. If it is batch norm of another class, "
    "jaxbn.convert.to_jaxbn(model, replace=...) says so.",
)
NO_VALUES = Finding(
    "receives no value: all are masked out, or it is in a branch that is not "
    "taken.",
    "Not examined. Its statistics do not move.",
)


def _of_layer(layer: Health, devices: int) -> list[Finding]:
    """Returns the findings on one layer."""
    return [
        *_of_statistics(layer),
        *_of_batches(layer, devices),
        *_of_channels(layer),
    ]


def _of_statistics(layer: Health) -> list[Finding]:
    finite = np.isfinite(layer.running_mean) & np.isfinite(layer.running_var)
    if not finite.all():
        return [
            Finding(
                "holds running statistics that are not finite.",
                "One batch with a NaN or inf is enough: jaxbn's "
                "running=Running(skip_nonfinite=True) keeps it out. jaxbn.precise.recompute "
                "makes them anew.",
            )
        ]
    if layer.negative.any():
        return [
            Finding(
                "holds negative running variances, which no batch has: "
                "inference returns NaN where they are below -epsilon.",
                "Something else than the layer writes them: an optimizer or "
                "weight decay on batch_stats, an extrapolated average of "
                "weights, a checkpoint under other names. "
                "jaxbn.precise.recompute makes them anew.",
            )
        ]
    mismatch = _mismatch(layer) if layer.mismatched.any() else None
    return [] if mismatch is None else [mismatch]


def _of_batches(layer: Health, devices: int) -> list[Finding]:
    found = []
    if layer.axis_name is None and devices > 1:
        found.append(
            Finding(
                "is not synchronized: no axis_name, so each of the "
                f"{devices} devices of shard_map or pmap normalizes alone.",
                'Set axis_name="data", or jaxbn.convert.to_jaxbn(model, '
                'axis_name="data"). (Under plain jit on sharded arrays all is '
                "well.)",
            )
        )
    if layer.values <= 1:
        found.append(
            Finding(
                "normalizes one value a channel, which is its own mean: in "
                "training its output is the bias whatever the input.",
                "Raise the batch size, synchronize over more devices, or leave "
                "the layer out.",
            )
        )
    elif layer.examples < FEW_EXAMPLES:
        found.append(
            Finding(
                "normalizes over {} examples, so that its output in training "
                "carries a noise of {}.",
                f"Below {FEW_EXAMPLES} accuracy suffers: synchronize over more "
                "devices, raise the batch size, or use renorm.",
                ((layer.examples, "g"), (layer.noise, ".0%")),
            )
        )
    if layer.separation > FAR_APART:
        found.append(
            Finding(
                "is called {} times a batch, on inputs whose statistics lie {} "
                "standard deviations apart: its running statistics are those "
                "of none of them.",
                "Give each use statistics of its own: sharing=Scope(num_ids=K) with ids in the "
                "call, or a layer for each. Or normalize all inputs in one "
                "call.",
                ((layer.calls, ".3g"), (layer.separation, ".2g")),
            )
        )
    return found


def _of_channels(layer: Health) -> list[Finding]:
    found = []
    size = len(layer.mean)
    finite = np.isfinite(layer.running_mean) & np.isfinite(layer.running_var)
    if finite.all() and layer.exploding.any():
        found.append(
            Finding(
                "has channels beyond 1e6.",
                "Lower the learning rate, or normalize before them.",
            )
        )
    if layer.dead.any() and layer.values > 1:
        found.append(
            Finding(
                "has dead channels ({} of them), which hold one value whatever "
                "the input.",
                "A ReLU before them that never fires is the usual cause; "
                "lower the learning rate, or prune them.",
                ((float(layer.dead.mean()), ".0%"),),
            )
        )
    small = layer.below_epsilon
    if small.any():
        std = layer.var[small] / (layer.var[small] + layer.epsilon)
        found.append(
            Finding(
                "has an input whose variance is below epsilon ({} of its "
                "channels), so that its output has a standard deviation down "
                "to {} in place of 1.",
                "It is the scale of the input: scale the data, or the weights "
                "in front, up; or lower epsilon.",
                (
                    (float(small.sum() / size), ".0%"),
                    (math.sqrt(std.min()), ".2g"),
                ),
            )
        )
    if layer.scale is not None and layer.zero_scale.all():
        found.append(
            Finding(
                "has every scale near zero, so that nothing passes.",
                "Right for zero-initialized residual branches before "
                "training; later it means weight decay on scale: leave scale "
                "and bias out of it.",
            )
        )
    unusual = layer.input_std and not 1e-2 < layer.input_std < 1e3
    if unusual and not small.any():
        found.append(
            Finding(
                "has an input of standard deviation {}, far from 1.",
                "Weights before batch norm may drift in size without changing "
                "the output, while the effective learning rate goes with "
                "1 / size^2: give them weight decay (too much makes epsilon "
                "count).",
                ((layer.input_std, ".2g"),),
            )
        )
    return found


def _mismatch(layer: Health) -> Finding | None:
    if np.all(layer.running_mean == 0) and np.all(layer.running_var == 1):
        return Finding(
            "still has the running statistics it started with.",
            'In flax.linen model.apply(..., mutable=["batch_stats"]) returns '
            "the new ones, which go into the next step; in flax.nnx calls after "
            "model.train() update them.",
        )
    if layer.separation > FAR_APART:
        return None  # said of the calls, none of which they belong to
    w, misfit = layer.initial_weight()
    if 0.01 < w <= 1 and misfit < 0.5:
        momentum = 0.99 if layer.momentum is None else layer.momentum
        steps = math.log(w) / math.log(momentum) if 0 < momentum < 1 else 0
        return Finding(
            "has running statistics that have not converged: about {} of "
            "their start is left, as after {} steps with momentum {}.",
            "Train longer, lower momentum, use jaxbn's running=Running(debias=True), or "
            "recompute them: jaxbn.precise.recompute.",
            ((w, ".0%"), (steps, ".0f"), (momentum, "g")),
        )
    return Finding(
        "has running statistics that are not those of this data.",
        "They come from other data, another preprocessing or mode, from "
        "weights that were changed or averaged afterwards, or from one device "
        "of several. If this data is right, recompute them: "
        "jaxbn.precise.recompute.",
    )


def _ranges(findings: Sequence[Finding]) -> list[str]:
    """Each figure of the findings, or from the least to the largest."""
    found = []
    for entries in zip(*(finding.figures for finding in findings)):
        least, most = min(entries), max(entries)
        texts = [format(number, form) for number, form in (least, most)]
        found.append(" to ".join(dict.fromkeys(texts)))
    return found


def _listed(paths: Sequence[str], every: Sequence[str]) -> str:
    names = [path or "(the layer)" for path in paths]
    if len(names) > 1 and paths == every:
        return f"Every layer ({len(names)})"
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} more layers: each"
    return ", ".join(names) + (": each" if len(names) > 1 else "")
