"""Batch normalization in float64 numpy; shares no code with the library."""

from typing import NamedTuple

import numpy as np


class Reference(NamedTuple):
    y: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray


def batch_norm(x, scale, bias, keep, cotangent, *, epsilon=1e-5) -> Reference:
    """Forward and backward over all axes but the last.

    keep is False where a value is left out. There x may be NaN or inf: then it
    is read as the mean, and has no derivative.
    """
    x, scale, bias, cotangent = (
        np.asarray(a).astype(np.float64) for a in (x, scale, bias, cotangent)
    )
    axes = tuple(range(x.ndim - 1))
    keep = np.broadcast_to(keep, x.shape)
    count = keep.sum(axes)
    n = np.maximum(count, 1)
    mean = np.where(keep, x, 0).sum(axes) / n
    deviation = np.where(keep | np.isfinite(x), x - mean, 0)
    var = (np.square(deviation) * keep).sum(axes) / n
    inv = 1 / np.sqrt(var + epsilon)
    xhat = deviation * inv
    y = xhat * scale + bias

    c = np.where(keep | np.isfinite(x), cotangent * scale, 0)
    dx = c - keep * (c.sum(axes) + xhat * (c * xhat).sum(axes)) / n
    return Reference(
        y=y,
        count=count,
        mean=mean,
        var=var,
        dx=dx * inv,
        dscale=(cotangent * xhat).sum(axes),
        dbias=cotangent.sum(axes),
    )
