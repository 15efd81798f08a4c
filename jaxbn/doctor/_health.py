"""Measurements of a batch norm layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Health:
    """Measurements of one layer; with ids, rows are concatenated.

    If n of the b examples of a batch are normalized together, the noise is that
    of the whole batch times sqrt(b / n).

    Attributes:
      path: path of the layer's variables in the model.
      kind: flax, jaxbn, or the name of the class.
      axis_name: mesh axis or axes; None if not synchronized.
      examples: number of examples normalized together, masked ones included;
        with ids, on average.
      momentum: momentum of the layer; None weights all batches equally.
      running_mean: (C,) running mean, unit of the input.
      running_var: (C,) running variance, unit of the input squared.
      mean: (C,) mean of the data.
      var: (C,) biased variance of the data.
      mean_noise: (C,) standard error of a running mean, in standard deviations
        of the data.
      var_noise: (C,) relative standard error of a running variance.
      gap: root mean square difference of the layer's outputs in training and
        inference, in standard deviations of the output, over the whole batch.
      noise: the gap if running statistics were equal to those of the data.
      scale: (C,), or None.
      epsilon: epsilon of the layer, unit of the input squared.
      calls: number of calls per batch.
      values: average number of values per channel normalized together.
      separation: root mean square distance between the statistics of the calls
        of a batch, in standard deviations, beyond their variation over batches.
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
        """Channels that are constant, up to float32 rounding."""
        dead: np.ndarray = np.sqrt(self.var) <= 1e-6 * np.abs(self.mean)
        return dead

    @property
    def below_epsilon(self) -> np.ndarray:
        """Channels that are not constant, with variance below epsilon."""
        small: np.ndarray = (self.var < self.epsilon) & ~self.dead
        return small

    @property
    def exploding(self) -> np.ndarray:
        """Channels that are nonfinite or too large for float32 statistics."""
        size = np.abs(self.mean) + np.sqrt(self.var)
        finite = np.isfinite(self.running_mean) & np.isfinite(self.running_var)
        beyond: np.ndarray = ~finite | ~np.isfinite(size) | (size > 1e6)
        return beyond

    @property
    def zero_scale(self) -> np.ndarray:
        """Channels whose scale is near zero."""
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
        """Channels whose running statistics differ from those of the data.

        By more than a fixed tolerance and the noise of a moving average.
        """
        ratio = (self.running_var + self.epsilon) / (self.var + self.epsilon)
        mean = self.z > 0.05 + 4 * self.mean_noise
        var = np.abs(np.log(ratio)) > 0.1 + 4 * self.var_noise
        return mean | var

    def initial_weight(self) -> tuple[float, float]:
        """Returns (w, misfit) of running = (1 - w) data + w (0, 1).

        A least squares fit over channels, with mean and variance in units of
        the data; misfit is the unexplained fraction of the difference.
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
