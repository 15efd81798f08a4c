"""The norm of the gradient through batch norm, computed and by its formula."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._batch_norm import batch_norm
from jaxbn._checks import (
    check_features,
    check_input,
    describe,
    split_axes,
)
from jaxbn._moments import moments


class LipschitzIdentity(NamedTuple):
    """Both sides of the identity.

    Attributes:
      lhs: (C,) ||dL/dy||^2 from the backward pass.
      rhs: (C,) ||dL/dy||^2 from the formula.
    """

    lhs: jax.Array
    rhs: jax.Array


def lipschitz_identity(
    y: jax.Array, cotangent: jax.Array, scale: jax.Array, *, epsilon: float
) -> LipschitzIdentity:
    """Returns both sides of the gradient's norm through batch norm.

    With s^2 = var + epsilon, yhat = (y - mean) / s, q = var / s^2, m values per
    channel and g the cotangent of z = scale yhat + bias:

    ||dL/dy||^2 = scale^2 / s^2
                  * (||g||^2 - <1, g>^2 / m - (2 - q) <g, yhat>^2 / m).

    Exact for every epsilon, with q = 1 for epsilon = 0: batch norm removes the
    mean of the gradient and its component along yhat, and divides by the
    standard deviation. The left side is computed by the backward pass of
    `jaxbn.batch_norm`, the right side by this formula.

    The paper has 1 / sqrt(m) as the last factor, in theorem 4.1 and in line (9)
    of appendix C. Then the right side is too small, even negative, and violates
    the inequality; line (8), with ||yhat|| = sqrt(m), implies 1 / m. The factor
    2 - q accounts for epsilon > 0, which the paper omits.

    Args:
      y: (..., C) floating, the input of batch norm.
      cotangent: g, with the shape of y.
      scale: (C,).
      epsilon: added to the variance, unit of y squared; may be 0.

    Returns:
      LipschitzIdentity (lhs (C,), rhs (C,)).

    Raises:
      ValueError: y is not floating or has only the feature axis; cotangent or
        scale has the wrong shape; or epsilon is negative.

    Source: Santurkar et al. (2018), How Does Batch Normalization Help
    Optimization?, theorem 4.1, corrected.
    """
    y, cotangent = check_input(y), jnp.asarray(cotangent)
    features, axes = split_axes(y, -1, needs_batch=True)
    scale = check_features("scale", scale, y, features)
    if cotangent.shape != y.shape:
        raise ValueError(
            f"cotangent must have the shape of y, {describe(y)}; got "
            f"{describe(cotangent)}."
        )
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative; got {epsilon}.")

    def normalized(y: jax.Array) -> jax.Array:
        return batch_norm(y, scale, epsilon=epsilon)[0]

    z, backward = jax.vjp(normalized, y)
    (slope,) = backward(cotangent.astype(z.dtype))
    lhs = jnp.square(widen(slope)).sum(axes)

    g = widen(cotangent)
    count, mean, m2 = moments(y)
    var = m2 / count
    squared = var + epsilon
    along = (g * (widen(y) - mean)).sum(axes) / jnp.sqrt(squared)
    q = var / squared
    rest = jnp.square(g).sum(axes) - jnp.square(g.sum(axes)) / count
    rest = rest - (2 - q) * jnp.square(along) / count
    return LipschitzIdentity(lhs, jnp.square(widen(scale)) / squared * rest)
