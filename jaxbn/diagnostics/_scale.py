"""Scale invariance of weights before batch norm, and their rotation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._check_values import is_known
from jaxbn.diagnostics._model import Loss, scalar_loss
from jaxbn.diagnostics._trees import (
    Path,
    channel_rows,
    check_same_structure,
    find_leaf,
    norm,
)


class ScaleInvariance(NamedTuple):
    """Deviation from scale invariance; 0 if epsilon = 0.

    Attributes:
      loss_difference: () |L(a W) - L(W)|.
      gradient_error: () ||a G(a W) - G(W)|| / ||G(W)||.
      radial: (C,) cosine between w_c and its gradient.
      inverse_square_norm: (C,) 1 / ||w_c||^2, proportional to the angle that a
        step rotates w_c by.
    """

    loss_difference: jax.Array
    gradient_error: jax.Array
    radial: jax.Array
    inverse_square_norm: jax.Array


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
    """Measures the effect of scaling a weight before batch norm.

    BN((a W) u) = BN(W u) for a > 0. Hence L(a W) = L(W), a G(a W) = G(W) for
    the gradient G, and <w_c, dL/dw_c> = 0 for every output channel c: a step
    rotates w_c by about learning rate * ||G at unit norm|| / ||w_c||^2. All
    three are exact without epsilon, and hold up to O(epsilon / variance) with
    it: with epsilon=1e-5, factor=0.01 makes variances 1e4 times smaller, and
    gradients differ by percents.

    Args:
      loss, params, batch_stats, batch: as in `gradient_line`.
      path: path of the weight in params, "Dense_0/kernel" or a tuple of keys.
      factor: a, positive.
      feature_axis: output channel axis of the weight.

    Returns:
      ScaleInvariance. gradient_error and radial are NaN if a gradient is zero.

    Raises:
      ValueError: params has no such array, factor is not positive, feature_axis
        is out of range, or loss returns something else.

    Source: Ioffe and Szegedy (2015), Batch Normalization, section 3.3; van
    Laarhoven (2017), L2 Regularization versus Batch and Weight Normalization.
    """
    if is_known(factor) and not factor > 0:
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
    """Returns the rotation angle of each output channel of a weight.

    With d = w' - w and its component d_p = d - w <w, d> / <w, w> orthogonal to
    w, angle = atan2(||d_p||, <w, w'> / ||w||). Accurate for small angles,
    unlike the arccos of a cosine, which in float32 is either 0 or at least
    3e-4.

    Args:
      params: tree of floating arrays, before a step.
      new_params: the same tree, after it.
      path: path of the weight, "Dense_0/kernel" or a tuple of keys.
      feature_axis: output channel axis of the weight.

    Returns:
      (C,) in radians, 0 to pi. NaN if a channel was zero.

    Raises:
      ValueError: params has no such array, new_params has another structure, or
        feature_axis is out of range.

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
    """Returns the equilibrium angle per step under SGD with weight decay.

    sqrt(2 learning_rate weight_decay / (1 + momentum)), reached after about
    1 / (learning_rate weight_decay) steps. Holds for scale-invariant weights
    with v = momentum v + g + weight_decay w and w = w - learning_rate v,
    independent of the loss.

    Args:
      learning_rate: positive.
      weight_decay: L2 weight decay, added to the gradient; not negative.
      momentum: heavy-ball momentum, 0 <= momentum < 1.

    Returns:
      The root mean square angle in radians.

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
