"""What is wrong with a batch norm layer, told from its statistics alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxbn._moments import Moments

# Below this many examples the noise of batch statistics costs accuracy.
# Wu and He (2018), Group Normalization, figure 1.
FEW_EXAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Health:
    """One layer; arrays have a value a channel, rows of ids in a row.

    Of b examples in a batch, n of which are normalized together, the noise is
    that of the whole batch times sqrt(b / n).

    Attributes:
      path: where the layer's variables lie in the model.
      kind: flax, jaxbn, or the name of the class.
      axis_name: mesh axis, or axes; None where it is not synchronized.
      examples: that are normalized together.
      momentum: of the layer; None weighs all batches equally.
      running_mean: (C,) what inference normalizes with, unit of the input.
      running_var: (C,) likewise, unit of the input squared.
      mean: (C,) of the data.
      var: (C,) of the data, biased.
      mean_noise: (C,) of a running mean, in standard deviations of the data.
      var_noise: (C,) of a running variance, relative.
      gap: root mean square of what the layer's output changes by between
        training and inference, in standard deviations of the output, over
        the whole batch.
      noise: what would be left of the gap with running statistics equal to
        those of the data.
      scale: (C,), or None where the layer has none.
      epsilon: of the layer, unit of the input squared.
    """

    path: str
    kind: str
    axis_name: Any
    examples: float
    momentum: float | None
    running_mean: np.ndarray
    running_var: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    mean_noise: np.ndarray
    var_noise: np.ndarray
    gap: float
    noise: float
    scale: np.ndarray | None
    epsilon: float

    @property
    def z(self) -> np.ndarray:
        """(C,) |mean_running - mean| / std, std = sqrt(var + epsilon)."""
        z: np.ndarray = np.abs(self.running_mean - self.mean) / self._std
        return z

    @property
    def kl(self) -> np.ndarray:
        """(C,) KL(data || running) of normal distributions, in nats."""
        p, q = self.var + self.epsilon, self.running_var + self.epsilon
        distance = np.abs(self.running_mean - self.mean) ** 2
        kl: np.ndarray = 0.5 * (np.log(q / p) + (p + distance) / q - 1)
        return kl

    @property
    def dead(self) -> np.ndarray:
        """Channels that hold (nearly) one value, so that var is nothing."""
        return self.var < self.epsilon

    @property
    def exploding(self) -> np.ndarray:
        """Channels beyond what float32 squares or averages well."""
        size = np.abs(self.mean) + np.sqrt(self.var)
        finite = np.isfinite(self.running_mean) & np.isfinite(self.running_var)
        beyond: np.ndarray = ~finite | ~np.isfinite(size) | (size > 1e6)
        return beyond

    @property
    def closed(self) -> np.ndarray:
        """Channels whose scale is near zero, so that nothing passes."""
        if self.scale is None:
            return np.zeros(0, bool)
        shut: np.ndarray = np.abs(self.scale) < 1e-3
        return shut

    @property
    def input_std(self) -> float:
        """Root mean square of the standard deviations."""
        return math.sqrt(np.mean(self.var)) if self.var.size else 0.0

    @property
    def _std(self) -> np.ndarray:
        return np.sqrt(self.var + self.epsilon)

    @property
    def off(self) -> np.ndarray:
        """Channels whose running statistics are off by more than noise.

        That of an average, and by more than anybody would accept.
        """
        ratio = (self.running_var + self.epsilon) / (self.var + self.epsilon)
        mean = self.z > 0.05 + 4 * self.mean_noise
        var = np.abs(np.log(ratio)) > 0.1 + 4 * self.var_noise
        return mean | var

    def left_of_start(self) -> tuple[float, float]:
        """Returns (w, misfit) of running = (1 - w) data + w (0, 1).

        By least squares over the channels, mean and variance in units of the
        data; misfit is the share of the difference that w does not explain.
        """
        v = self.var + self.epsilon
        towards = np.concatenate([-self.mean.real / self._std, (1 - v) / v])
        moved = np.concatenate(
            [
                (self.running_mean - self.mean).real / self._std,
                (self.running_var - self.var) / v,
            ]
        )
        w = float(towards @ moved / max(towards @ towards, 1e-30))
        left = float(np.linalg.norm(moved - w * towards))
        return w, left / max(float(np.linalg.norm(moved)), 1e-30)


def measure(parts: list[Moments], momentum: float | None) -> dict[str, Any]:
    """Returns mean, var and noise of one layer from its moments by batch."""
    count, mean, m2 = (np.stack(field) for field in zip(*parts))
    batch_var = m2 / np.maximum(count, 1)
    weight = count / np.maximum(count.sum(0), 1)
    center = (weight * mean).sum(0)
    between = np.abs(mean - center) ** 2
    var = (weight * (batch_var + between)).sum(0)
    # An average of independent batches keeps this share of their variance.
    old = 0.99 if momentum is None else momentum
    kept = math.sqrt((1 - old) / (1 + old))
    safe = np.maximum(var, np.finfo(np.float64).tiny)
    return dict(
        mean=center.ravel(),
        var=var.ravel(),
        mean_noise=(kept * mean.std(0) / np.sqrt(safe)).ravel(),
        var_noise=(kept * batch_var.std(0) / safe).ravel(),
    )


def gap(
    parts: list[Moments], mean: np.ndarray, var: np.ndarray, epsilon: float
) -> float:
    """Root mean square change of a standardized output, training to inference.

    For an input mean_b + std_b u the two outputs are u and
    (mean_b - mean + std_b u) / std, so that the square is
    (1 - std_b / std)^2 + ((mean_b - mean) / std)^2 in the mean over u.
    """
    squares = []
    for count, batch_mean, m2 in parts:
        batch_var = (m2 / np.maximum(count, 1)).ravel()
        seen = (count.ravel() > 0) & (batch_var > epsilon)
        std = np.sqrt(var + epsilon)
        stretch = 1 - np.sqrt(batch_var + epsilon) / std
        shift = np.abs(batch_mean.ravel() - mean) / std
        squares.append((stretch**2 + shift**2)[seen])
    together = np.concatenate(squares)
    return float(np.sqrt(together.mean())) if together.size else 0.0


def warnings(layers: list[Health], devices: int) -> list[str]:
    """Returns what is wrong, in words, with the remedy; one entry a cause."""
    found: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        for cause, remedy in _complaints(layer, devices):
            found.setdefault((cause, remedy), []).append(layer.path)
    return [
        f"{_listed(paths, len(layers))} {cause} {remedy}"
        for (cause, remedy), paths in found.items()
    ]


def _complaints(layer: Health, devices: int) -> list[tuple[str, str]]:
    """Returns pairs (what is the matter, what to do)."""
    found = []
    finite = np.isfinite(layer.running_mean) & np.isfinite(layer.running_var)
    if not finite.all():
        found.append(
            (
                "holds running statistics that are not finite.",
                "One batch with a NaN or inf is enough: jaxbn's "
                "skip_nonfinite=True keeps it out. jaxbn.precise.recompute "
                "makes them anew.",
            )
        )
    elif layer.off.any():
        found.append(_mismatch(layer))
    if layer.axis_name is None and devices > 1:
        found.append(
            (
                "is not synchronized: no axis_name, so each of the "
                f"{devices} devices of shard_map or pmap normalizes alone.",
                'Set axis_name="data", or jaxbn.convert.to_jaxbn(model, '
                'axis_name="data"). (Under plain jit on sharded arrays all is '
                "well.)",
            )
        )
    if layer.examples < FEW_EXAMPLES:
        found.append(
            (
                f"normalizes over {layer.examples:g} examples, so that its "
                f"output in training carries a noise of {layer.noise:.0%}.",
                f"Below {FEW_EXAMPLES} accuracy suffers: synchronize over more "
                "devices, raise the batch size, or use renorm.",
            )
        )
    if finite.all() and layer.exploding.any():
        found.append(
            (
                "has channels beyond 1e6.",
                "Lower the learning rate, or normalize before them.",
            )
        )
    if layer.dead.any():
        found.append(
            (
                "has dead channels, which hold one value whatever the input.",
                "A ReLU before them that never fires is the usual cause; "
                "lower the learning rate, or prune them.",
            )
        )
    if layer.scale is not None and layer.closed.all():
        found.append(
            (
                "has every scale near zero, so that nothing passes.",
                "Right for zero-initialized residual branches before "
                "training; later it means weight decay on scale: leave scale "
                "and bias out of it.",
            )
        )
    if layer.input_std and not 1e-2 < layer.input_std < 1e3:
        found.append(
            (
                "has an input of standard deviation far from 1.",
                "Weights before batch norm may drift in size without changing "
                "the output, while the effective learning rate goes with "
                "1 / size^2: give them weight decay (too much makes epsilon "
                "count).",
            )
        )
    return found


def _mismatch(layer: Health) -> tuple[str, str]:
    w, misfit = layer.left_of_start()
    if np.all(layer.running_mean == 0) and np.all(layer.running_var == 1):
        return (
            "still has the running statistics it started with.",
            'They are updated by model.apply(..., mutable=["batch_stats"]) '
            "and have to be carried to the next step.",
        )
    if 0.01 < w <= 1 and misfit < 0.5:
        momentum = 0.99 if layer.momentum is None else layer.momentum
        steps = math.log(w) / math.log(momentum) if 0 < momentum < 1 else 0
        return (
            "has running statistics that have not converged: about "
            f"{w:.0%} of their start is left, as after {steps:.0f} steps "
            f"with momentum {momentum:g}.",
            "Train longer, lower momentum, use jaxbn's debias=True, or "
            "recompute them: jaxbn.precise.recompute.",
        )
    return (
        "has running statistics that are not those of this data.",
        "They come from other data, another preprocessing or mode, from "
        "weights that were changed or averaged afterwards, or from one device "
        "of several. If this data is right, recompute them: "
        "jaxbn.precise.recompute.",
    )


def _listed(paths: list[str], layers: int) -> str:
    if len(paths) == layers > 1:
        return f"Every layer ({layers})"
    if len(paths) > 3:
        return f"{paths[0]}, {paths[1]} and {len(paths) - 2} more layers: each"
    return ", ".join(paths) + (": each" if len(paths) > 1 else "")
