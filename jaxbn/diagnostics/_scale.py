"""The size of a weight before batch norm: no effect but on the step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._checks import check_features, check_input, describe, split_axes
from jaxbn._moments import moments
from jaxbn._normalize import batch_norm
from jaxbn.diagnostics._model import Loss, scalar_loss
from jaxbn.diagnostics._trees import (
    Path,
    channel_rows,
    check_same_structure,
    find_leaf,
    norm,
)


class ScaleInvariance(NamedTuple):
    """How far a weight is from scale invariance; 0 with epsilon = 0.

    Attributes:
      loss_difference: () |L(a W) - L(W)|.
      gradient_error: () ||a G(a W) - G(W)|| / ||G(W)||.
      radial: (C,) cosine between w_c and its gradient.
      inverse_square_norm: (C,) 1 / ||w_c||^2, a factor of the angle that a
        step turns w_c by.
    """

    loss_difference: jax.Array
    gradient_error: jax.Array
    radial: jax.Array
    inverse_square_norm: jax.Array


class LipschitzIdentity(NamedTuple):
    """Two sides of one equation.

    Attributes:
      lhs: (C,) ||dL/dy||^2 of the backward pass.
      rhs: (C,) the same by the formula.
    """

    lhs: jax.Array
    rhs: jax.Array


def scale_invariance(
    loss: Loss,
    params: Any,
    batch_stats: Any,
    batch: Any,
    *,
    path: Path,
    factor: float,
    feature_axis: int = -1,
) -> ScaleInvariance:
    """Measures what changes when a weight before batch norm is scaled.

    BN((a W) u) = BN(W u) for a > 0. Hence L(a W) = L(W), a G(a W) = G(W) for
    the gradient G, and <w_c, dL/dw_c> = 0 for every output channel c: a step
    turns w_c by an angle of about learning rate * ||G at unit norm|| / ||w_c||^2.
    All three are exact without epsilon, and off by O(epsilon / variance) with
    it: with epsilon=1e-5, factor=0.01 makes the variances 1e4 times smaller
    and the gradients wrong by percents.

    Args:
      loss, params, batch_stats, batch: as in `gradient_line`.
      path: of one array of params, "Dense_0/kernel" or its keys.
      factor: a, positive.
      feature_axis: axis of the weight that batch norm keeps apart.

    Returns:
      ScaleInvariance. gradient_error and radial are NaN where a gradient is
      zero.

    Raises:
      ValueError: params has no such array, factor is not positive,
        feature_axis is no axis of it, or loss returns something else.

    Source: Ioffe and Szegedy (2015), Batch Normalization, section 3.3; van
    Laarhoven (2017), L2 Regularization versus Batch and Weight Normalization.
    """
    if not isinstance(factor, jax.core.Tracer) and not factor > 0:
        raise ValueError(f"factor must be positive; got {factor}.")
    index = find_leaf(params, path, what="params")
    leaves, treedef = jax.tree.flatten(params)
    weight = leaves[index]
    rows = channel_rows(weight, feature_axis)
    scalar = scalar_loss(loss, batch_stats, batch)

    def of_weight(weight: jax.Array) -> jax.Array:
        rest = leaves[:index] + [weight] + leaves[index + 1 :]
        return scalar(jax.tree.unflatten(treedef, rest))

    value, gradient = jax.value_and_grad(of_weight)(weight)
    scaled = (factor * weight).astype(weight.dtype)
    value_scaled, there = jax.value_and_grad(of_weight)(scaled)
    slopes = channel_rows(gradient, feature_axis)
    squared = jnp.square(rows).sum(1)
    return ScaleInvariance(
        jnp.abs(value_scaled - value),
        norm(factor * widen(there) - widen(gradient)) / norm(gradient),
        (rows * slopes).sum(1) / jnp.sqrt(squared * jnp.square(slopes).sum(1)),
        1 / squared,
    )


def angular_update(
    params: Any, new_params: Any, *, path: Path, feature_axis: int = -1
) -> jax.Array:
    """Returns the angle by which each output channel of a weight has turned.

    With d = w' - w and its part d_p = d - w <w, d> / <w, w> across w,
    angle = atan2(||d_p||, <w, w'> / ||w||): right to all digits for small
    angles, where an arccos of a cosine in float32 is 0 or at least 3e-4.

    Args:
      params: tree of floating arrays, before a step.
      new_params: the same tree, after it.
      path: of one array, "Dense_0/kernel" or its keys.
      feature_axis: axis of the weight that batch norm keeps apart.

    Returns:
      (C,) in radians, 0 to pi. NaN where a channel was zero.

    Raises:
      ValueError: params has no such array, new_params is another tree, or
        feature_axis is no axis of the array.

    Source: Wan et al. (2021), Spherical Motion Dynamics.
    """
    check_same_structure(new_params, params, what="new_params", than="params")
    index = find_leaf(params, path, what="params")
    old, new = (
        channel_rows(jax.tree.leaves(tree)[index], feature_axis)
        for tree in (params, new_params)
    )
    length = jnp.linalg.norm(old, axis=1, keepdims=True)
    unit = old / length
    d = new - old
    along = (unit * d).sum(1, keepdims=True)
    across = jnp.linalg.norm(d - unit * along, axis=1)
    return jnp.arctan2(across, (length + along)[:, 0])


def equilibrium_angle(
    learning_rate: float, weight_decay: float, momentum: float = 0.0
) -> float:
    """Returns the angle a step that weight decay and growth settle at.

    sqrt(2 learning_rate weight_decay / (1 + momentum)), reached after about
    1 / (learning_rate weight_decay) steps. It holds for scale-invariant
    weights under SGD with v = momentum v + g + weight_decay w and
    w = w - learning_rate v, and does not depend on the loss.

    Args:
      learning_rate: positive.
      weight_decay: of the L2 kind, added to the gradient; not negative.
      momentum: of the heavy ball, 0 <= momentum < 1.

    Returns:
      The root mean square of the angle, in radians.

    Raises:
      ValueError: an argument is out of range.

    Source: Wan et al. (2021), Spherical Motion Dynamics.
    """
    if not (learning_rate > 0 and weight_decay >= 0 and 0 <= momentum < 1):
        raise ValueError(
            "learning_rate must be positive, weight_decay not negative and "
            f"momentum in [0, 1); got {learning_rate}, {weight_decay} and "
            f"{momentum}."
        )
    return math.sqrt(2 * learning_rate * weight_decay / (1 + momentum))


def lipschitz_identity(
    y: jax.Array, cotangent: jax.Array, scale: jax.Array, *, epsilon: float
) -> LipschitzIdentity:
    """Returns both sides of the gradient's norm through batch norm.

    With s^2 = var + epsilon, yhat = (y - mean) / s, q = var / s^2, m values a
    channel and g the cotangent of z = scale yhat + bias:

    ||dL/dy||^2 = scale^2 / s^2
                  * (||g||^2 - <1, g>^2 / m - (2 - q) <g, yhat>^2 / m).

    Exact for every epsilon, where q = 1 for epsilon = 0: batch norm takes the
    mean of the gradient and its part along yhat away, and divides by the
    standard deviation. The left side is of `jaxbn.batch_norm`'s own backward
    pass, the right side of this formula.

    The paper prints the last factor as 1 / sqrt(m), in theorem 4.1 and in line
    (9) of its appendix C. With it the right side is too small, even negative,
    and the inequality is violated; from line (8), where yhat / ||yhat|| has
    ||yhat|| = sqrt(m), follows 1 / m. The factor 2 - q is for epsilon > 0,
    which the paper leaves out.

    Args:
      y: (..., C) floating, what is normalized.
      cotangent: g, as y.
      scale: (C,).
      epsilon: added to the variance, unit of y squared; may be 0.

    Returns:
      LipschitzIdentity (lhs (C,), rhs (C,)).

    Raises:
      ValueError: y is not floating or has no axis but the features; cotangent
        or scale does not fit; or epsilon is negative.

    Source: Santurkar et al. (2018), How Does Batch Normalization Help
    Optimization?, theorem 4.1, corrected.
    """
    y, cotangent = check_input(y), jnp.asarray(cotangent)
    features, axes = split_axes(y, -1, needs_batch=True)
    scale = check_features("scale", scale, y, features)
    if cotangent.shape != y.shape:
        raise ValueError(
            f"cotangent must be as y, which is {describe(y)}; got "
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
