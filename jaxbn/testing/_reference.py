"""Batch normalization in float64 numpy, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.testing._leaves import widest


class Float64Reference(NamedTuple):
    """Result of `float64_reference`; gradients are None without cotangent.

    Attributes:
      y: normalized x, scaled and shifted, in the shape of x.
      count: (C,) number of included values.
      mean: (C,) mean of the included values.
      var: (C,) biased variance of the included values.
      dx: gradient with respect to x, in its shape.
      dscale: (C,) gradient with respect to scale.
      dbias: (C,) gradient with respect to bias.
    """

    y: np.ndarray
    count: np.ndarray  # type: ignore[assignment]
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray | None = None
    dscale: np.ndarray | None = None
    dbias: np.ndarray | None = None


def float64_reference(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    where: Any = None,
    cotangent: Any = None,
    epsilon: float = 1e-5,
    feature_axis: int | Sequence[int] = -1,
) -> Float64Reference:
    """Batch normalization in float64 numpy; shares no code with the library.

    y = xhat * scale + bias with xhat = (x - mean) / sqrt(var + epsilon) and the
    statistics of the included values. The gradients are those of sum(y *
    cotangent): with c = cotangent * scale, dx sqrt(var + epsilon) = c - (sum(c)
    + xhat sum(c xhat)) / count, the last term for included values only.

    Args:
      x: (..., C), of any dtype; its values are taken as exact.
      scale: (C,), or None for 1.
      bias: (C,), or None for 0.
      where: bool, broadcastable to x; False excludes a value from the
        statistics. NaN or inf there acts as the mean, without derivative.
      cotangent: broadcastable to x; None skips the gradients.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the feature axis or axes.

    Returns:
      Float64Reference. A feature without included values has mean and var 0.

    Raises:
      ValueError: numpy cannot broadcast an argument to x.

    Source: Ioffe and Szegedy (2015), Batch Normalization, section 3.
    """
    x = widest(x)
    given = (feature_axis,) if isinstance(feature_axis, int) else feature_axis
    features = {axis % x.ndim for axis in given}
    rest = tuple(axis for axis in range(x.ndim) if axis not in features)
    gain, shift = (
        default if value is None else np.expand_dims(widest(value), rest)
        for value, default in ((scale, 1.0), (bias, 0.0))
    )

    def total(values: np.ndarray) -> np.ndarray:
        summed: np.ndarray = values.sum(rest, keepdims=True)
        return summed

    kept = np.broadcast_to(True if where is None else where, x.shape)
    read = kept | np.isfinite(x)
    count = total(kept)
    n = np.maximum(count, 1)
    mean = total(np.where(kept, x, 0)) / n
    deviation = np.where(read, x - mean, 0)
    var = total(np.where(kept, deviation, 0) ** 2) / n
    sigma = np.sqrt(var + epsilon)
    xhat = deviation / sigma
    statistics = [a.squeeze(rest) for a in (count, mean, var)]
    out = Float64Reference(xhat * gain + shift, *statistics)
    if cotangent is None:
        return out
    cotangent = np.broadcast_to(widest(cotangent), x.shape)
    c = np.where(read, cotangent * gain, 0)
    dx = c - np.where(kept, (total(c) + xhat * total(c * xhat)) / n, 0)
    affine = [total(a).squeeze(rest) for a in (cotangent * xhat, cotangent)]
    return Float64Reference(*out[:4], dx / sigma, *affine)
