"""Statistics of a layer over batches, and its train-inference gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbn._passes import Moments


def measure(
    parts: Sequence[tuple[Moments, Moments, Moments]], momentum: float | None
) -> dict[str, Any]:
    """Computes statistics of a layer from its moments in each batch.

    Args:
      parts: values, means and stds of `Collected`, for each batch.
      momentum: momentum of the layer.

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
    # Variance of a moving average of independent batches, relative to theirs.
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

    For k equally distributed calls, their average varies over batches by 1 / k
    of the variance of one call. So k times the variance of the averages is
    subtracted from the variance between calls, unless both are similar.
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
        # At least the variance for independent values.
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
    """Root mean square difference of outputs in training and inference.

    For an input mean_b + std_b u of a call, the standardized outputs are u and
    (mean_b - mean + std_b u) / std, whose mean squared difference over u is
    u^2 (1 - std_b / std)^2 + ((mean_b - mean) / std)^2.

    Args:
      parts: values, means and stds of `Collected`, for each batch.
      mean: (C,) mean in inference.
      var: (C,) variance in inference.
      epsilon: epsilon of the layer.

    Returns:
      Root mean square over channels, calls and batches; NaN if a variance is
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
    """Stacks one of the three Moments over batches."""
    return tuple(np.stack(field) for field in zip(*(p[which] for p in parts)))
