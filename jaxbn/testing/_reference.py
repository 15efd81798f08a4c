"""Batch normalization in float64 numpy, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.testing._leaves import widest


class Float64Reference(NamedTuple):
    """What `float64_reference` returns; dx, dscale, dbias want a cotangent.

    Attributes:
      y: shape of x, scaled and shifted.
      count: (C,) kept values.
      mean: (C,) of the kept values.
      var: (C,) biased.
      dx: gradient, shape of x.
      dscale: (C,) gradient.
      dbias: (C,) gradient.
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

    y = xhat * scale + bias with xhat = (x - mean) / sqrt(var + epsilon), the
    statistics taken over the kept values. The gradients are those of
    sum(y * cotangent): with c = cotangent * scale, dx sqrt(var + epsilon) =
    c - (sum(c) + xhat sum(c xhat)) / count, the last term at kept values only.

    Args:
      x: (..., C), any dtype; the values it holds are taken as exact.
      scale: (C,) or None for 1.
      bias: (C,) or None for 0.
      where: bool, broadcastable to x; False leaves a value out of the
        statistics. A NaN or inf there is read as the mean, without derivative.
      cotangent: broadcastable to x, or None.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the axis, or axes, that hold the features.

    Returns:
      Float64Reference. A feature without kept values has mean and var 0.

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
