"""Checks that find problems of a layer."""

from __future__ import annotations

import math

import numpy as np

from jaxbn.doctor._finding import Finding
from jaxbn.doctor._health import Health

# Below this many examples the noise of batch statistics costs accuracy.
# Wu and He (2018), Group Normalization, figure 1.
FEW_EXAMPLES = 16

# Distance between statistics of a layer's calls, in standard deviations,
# above which one set of running statistics does not fit them.
FAR_APART = 0.2

IN_INFERENCE = Finding(
    "runs in inference mode while the model trains, so its statistics are not "
    "updated.",
    "Not examined. Intended for a frozen layer; otherwise pass it the mode.",
)
NOT_CALLED = Finding(
    "is not called in training, so its statistics are not updated.",
    "Not examined. Intended if training takes another branch.",
)
UNKNOWN = Finding(
    "has a mean and a var in batch_stats, where no batch norm layer of flax "
    "or jaxbn is called in training.",
    "Not examined. Intended for other kinds of statistics, or if training "
    "takes another branch. If it is another class of batch norm, convert it "
    "with jaxbn.convert.to_jaxbn(model, replace=...).",
)
NO_VALUES = Finding(
    "receives no values: all are masked out, or it is in a branch that is not "
    "taken.",
    "Not examined. Its statistics are not updated.",
)


def check_layer(layer: Health, devices: int) -> list[Finding]:
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
                "has nonfinite running statistics.",
                "A single batch with NaN or inf causes this; "
                "running=Running(skip_nonfinite=True) skips such batches. "
                "Recompute them with jaxbn.precise.recompute.",
            )
        ]
    if layer.negative.any():
        return [
            Finding(
                "has negative running variances, which no batch produces: "
                "inference returns NaN where they are below -epsilon.",
                "Something other than the layer changed them: an optimizer or "
                "weight decay on batch_stats, extrapolated weight averaging, "
                "or a checkpoint with mismatched names. "
                "Recompute them with jaxbn.precise.recompute.",
            )
        ]
    mismatch = _mismatch(layer) if layer.mismatched.any() else None
    return [] if mismatch is None else [mismatch]


def _of_batches(layer: Health, devices: int) -> list[Finding]:
    found = []
    if layer.axis_name is None and devices > 1:
        found.append(
            Finding(
                "is not synchronized: without axis_name, each of the "
                f"{devices} devices of shard_map or pmap normalizes on its "
                "own.",
                'Set axis_name="data", or jaxbn.convert.to_jaxbn(model, '
                'axis_name="data"). (Not needed under plain jit '
                "on sharded arrays.)",
            )
        )
    if layer.values <= 1:
        found.append(
            Finding(
                "normalizes a single value per channel, which is its own mean: "
                "in training its output is the bias, whatever the input.",
                "Raise the batch size, synchronize over more devices, or leave "
                "the layer out.",
            )
        )
    elif layer.examples < FEW_EXAMPLES:
        found.append(
            Finding(
                "normalizes over {} examples, so its output in training has a "
                "noise of {}.",
                f"Accuracy degrades below {FEW_EXAMPLES}: synchronize over "
                "more devices, raise the batch size, or use renorm.",
                ((layer.examples, "g"), (layer.noise, ".0%")),
            )
        )
    if layer.separation > FAR_APART:
        found.append(
            Finding(
                "is called {} times per batch, on inputs whose statistics "
                "differ by {} standard deviations: its running statistics "
                "match none of them.",
                "Use separate statistics, by sharing=Scope(num_ids=K) and ids "
                "or by separate layers, or normalize all inputs in a single "
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
                "has channels with magnitudes above 1e6.",
                "Lower the learning rate, or normalize before them.",
            )
        )
    if layer.dead.any() and layer.values > 1:
        found.append(
            Finding(
                "has dead channels ({} of them), which are constant.",
                "The usual cause is a ReLU before them that never activates; "
                "lower the learning rate, or prune them.",
                ((float(layer.dead.mean()), ".0%"),),
            )
        )
    small = layer.below_epsilon
    if small.any():
        std = layer.var[small] / (layer.var[small] + layer.epsilon)
        found.append(
            Finding(
                "has an input with variance below epsilon ({} of its "
                "channels), so its output has a standard deviation as low as "
                "{} instead of 1.",
                "Scale up the data or the weights before the layer, or lower "
                "epsilon.",
                (
                    (float(small.sum() / size), ".0%"),
                    (math.sqrt(std.min()), ".2g"),
                ),
            )
        )
    if layer.scale is not None and layer.zero_scale.all():
        found.append(
            Finding(
                "has a scale near zero in all channels, which blocks the "
                "signal.",
                "Intended for zero-initialized residual branches before "
                "training; later a sign of weight decay on scale: exclude "
                "scale and bias from it.",
            )
        )
    unusual = layer.input_std and not 1e-2 < layer.input_std < 1e3
    if unusual and not small.any():
        found.append(
            Finding(
                "has an input of standard deviation {}, far from 1.",
                "The norm of weights before batch norm can drift without "
                "changing the output, but the effective learning rate scales "
                "with 1 / norm^2: apply weight decay to them (not so much that "
                "epsilon matters).",
                ((layer.input_std, ".2g"),),
            )
        )
    return found


def _mismatch(layer: Health) -> Finding | None:
    if np.all(layer.running_mean == 0) and np.all(layer.running_var == 1):
        return Finding(
            "still has its initial running statistics.",
            'In flax.linen, model.apply(..., mutable=["batch_stats"]) returns '
            "the new ones, to pass to the next step; in flax.nnx, calls after "
            "model.train() update them.",
        )
    if layer.separation > FAR_APART:
        return None  # reported as separated calls
    w, misfit = layer.initial_weight()
    if 0.01 < w <= 1 and misfit < 0.5:
        momentum = 0.99 if layer.momentum is None else layer.momentum
        steps = math.log(w) / math.log(momentum) if 0 < momentum < 1 else 0
        return Finding(
            "has running statistics that have not converged: the initial value "
            "still has a weight of about {}, as after {} steps with momentum "
            "{}.",
            "Train longer, lower momentum, use running=Running(debias=True), "
            "or recompute them with jaxbn.precise.recompute.",
            ((w, ".0%"), (steps, ".0f"), (momentum, "g")),
        )
    return Finding(
        "has running statistics that do not match this data.",
        "They come from other data, preprocessing or mode, from before the "
        "weights were changed or averaged, or from one of several devices. If "
        "this data is right, recompute them with jaxbn.precise.recompute.",
    )
