"""The measures of a batch norm layer, from the moments of its batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbn._passes import Moments


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
      calls: of the layer in a batch.
      values: of a channel that are normalized together, on average.
      separation: root mean square distance between the statistics of the calls
        of a batch, in standard deviations, beyond what batches differ by.
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
    calls: float = 1.0
    values: float = math.inf
    separation: float = 0.0

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
        with np.errstate(invalid="ignore", divide="ignore"):
            kl: np.ndarray = 0.5 * (np.log(q / p) + (p + distance) / q - 1)
        return kl

    @property
    def negative(self) -> np.ndarray:
        """Channels whose running variance is below zero."""
        return self.running_var < 0

    @property
    def dead(self) -> np.ndarray:
        """Channels that hold one value, up to the rounding of float32."""
        dead: np.ndarray = np.sqrt(self.var) <= 1e-6 * np.abs(self.mean)
        return dead

    @property
    def below_epsilon(self) -> np.ndarray:
        """Channels that vary, by a variance below epsilon."""
        small: np.ndarray = (self.var < self.epsilon) & ~self.dead
        return small

    @property
    def exploding(self) -> np.ndarray:
        """Channels beyond what float32 squares or averages well."""
        size = np.abs(self.mean) + np.sqrt(self.var)
        finite = np.isfinite(self.running_mean) & np.isfinite(self.running_var)
        beyond: np.ndarray = ~finite | ~np.isfinite(size) | (size > 1e6)
        return beyond

    @property
    def zero_scale(self) -> np.ndarray:
        """Channels whose scale is near zero, so that nothing passes."""
        if self.scale is None:
            return np.zeros(0, bool)
        zero: np.ndarray = np.abs(self.scale) < 1e-3
        return zero

    @property
    def input_std(self) -> float:
        """Root mean square of the standard deviations."""
        return math.sqrt(np.mean(self.var)) if self.var.size else 0.0

    @property
    def _std(self) -> np.ndarray:
        return np.sqrt(self.var + self.epsilon)

    @property
    def mismatched(self) -> np.ndarray:
        """Channels whose running statistics are off by more than noise.

        That of an average, and by more than anybody would accept.
        """
        ratio = (self.running_var + self.epsilon) / (self.var + self.epsilon)
        mean = self.z > 0.05 + 4 * self.mean_noise
        var = np.abs(np.log(ratio)) > 0.1 + 4 * self.var_noise
        return mean | var

    def initial_weight(self) -> tuple[float, float]:
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


def measure(
    parts: Sequence[tuple[Moments, Moments, Moments]], momentum: float | None
) -> dict[str, Any]:
    """Returns what is known of a layer from its moments by batch.

    Args:
      parts: of each batch the values, means and stds of `Collected`.
      momentum: of the layer.

    Returns:
      dict of mean, var, mean_noise, var_noise, calls, values and separation.
    """
    count, mean, m2 = _stacked(parts, 0)
    calls, mean_of_means, spread_of_means = _stacked(parts, 1)
    var_by_batch = m2 / np.maximum(count, 1)
    weight = count / np.maximum(count.sum(0), 1)
    center = (weight * mean).sum(0)
    between = np.abs(mean - center) ** 2
    var = (weight * (var_by_batch + between)).sum(0)
    # An average of independent batches keeps this share of their variance.
    old = 0.99 if momentum is None else momentum
    kept = math.sqrt((1 - old) / (1 + old))
    safe = np.maximum(var, np.finfo(np.float64).tiny)
    within = spread_of_means / np.maximum(calls, 1)
    apart = (np.abs(mean_of_means - center) ** 2 + within).mean(0)
    seen = calls > 0
    return dict(
        mean=center.ravel(),
        var=var.ravel(),
        mean_noise=(kept * np.sqrt(apart / safe)).ravel(),
        var_noise=(kept * var_by_batch.std(0) / safe).ravel(),
        calls=float(calls[seen].mean()) if seen.any() else 0.0,
        values=float((count[seen] / calls[seen]).mean()) if seen.any() else 0.0,
        separation=_separation(parts, safe),
    )


def _separation(parts: Any, var: np.ndarray) -> float:
    """Distance between the calls of a batch, see `Health.separation`.

    Of k calls alike, what a batch's average over them varies by is 1 / k of
    what one call does. So k times the variance of these averages is taken from
    the variance between calls; where they are much the same, nothing is left.
    """
    calls, count = (_stacked(parts, which)[0] for which in (1, 0))
    count = count.mean(0)
    excess = []
    for which in (1, 2):  # the means, and the standard deviations
        weight, center, spread = _stacked(parts, which)
        several = (calls > 1.5) & (weight > 0)
        # The weights of one batch are about equal.
        k = np.where(several, calls, 2)
        size = np.where(several, weight, 1)
        between = np.where(several, spread / size * k / (k - 1), 0).mean(0)
        # No less than that of independent values.
        noise = var * calls.mean(0) / np.maximum(count, 1)
        if len(parts) > 1:
            centers = np.abs(center - center.mean(0)) ** 2
            found = (k * centers).sum(0) / (len(parts) - 1)
            noise = np.maximum(noise, found)
        between, noise = (np.mean(a / var) for a in (between, noise))
        excess.append(between - noise if between > 2 * noise else 0.0)
    return math.sqrt(sum(excess))


def gap(
    parts: Sequence[tuple[Moments, Moments, Moments]],
    mean: np.ndarray,
    var: np.ndarray,
    epsilon: float,
) -> float:
    """Root mean square change of a standardized output, training to inference.

    For an input mean_b + std_b u of a call the two outputs are u and
    (mean_b - mean + std_b u) / std, so that the square is
    u^2 (1 - std_b / std)^2 + ((mean_b - mean) / std)^2 in the mean over u.

    Args:
      parts: of each batch the values, means and stds of `Collected`.
      mean: (C,) that inference subtracts.
      var: (C,) of inference.
      epsilon: of the layer.

    Returns:
      The root of the mean over channels, calls and batches; NaN where var is
      below -epsilon.
    """
    with np.errstate(invalid="ignore"):
        std = np.sqrt(var + epsilon)
    squares, calls = 0.0, 0.0
    for _, means, stds in parts:
        k, center, spread = (a.ravel() for a in means)
        weight, std_center, std_spread = (a.ravel() for a in stds)
        stretch = weight * (std - std_center) ** 2 + std_spread
        shift = k * np.abs(mean - center) ** 2 + spread
        squares += float(((stretch + shift) / std**2)[k > 0].sum())
        calls += float(k.sum())
    return math.sqrt(squares / calls) if calls else 0.0


def _stacked(parts: Any, which: int) -> tuple[np.ndarray, ...]:
    """One of the three Moments of each batch, on a new first axis."""
    return tuple(np.stack(field) for field in zip(*(p[which] for p in parts)))
