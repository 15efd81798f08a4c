"""The loss along its own gradient: how far a step can be trusted."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxbn.diagnostics._model import Loss, check_steps, map_rows, scalar_loss
from jaxbn.diagnostics._trees import dot, norm, step_along, subtract


class GradientLine(NamedTuple):
    """Loss and gradient at params - t * gradient, for every step t.

    Attributes:
      loss0: () at params.
      gradient_norm: () of the gradient g at params.
      loss: (K,) L(p - t g).
      predictiveness: (K,) ||g(p - t g) - g||, small is predictive.
      beta: (K,) predictiveness / (t ||g||), an effective smoothness.
      cosine: (K,) between g(p - t g) and g.
    """

    loss0: jax.Array
    gradient_norm: jax.Array
    loss: jax.Array
    predictiveness: jax.Array
    beta: jax.Array
    cosine: jax.Array

    @property
    def loss_range(self) -> jax.Array:
        """Largest loss on the line less the smallest, ()."""
        return self.loss.max(-1) - self.loss.min(-1)

    @property
    def effective_beta(self) -> jax.Array:
        """Largest beta on the line, (); it depends on the smallest step."""
        return self.beta.max(-1)


class Sharpness(NamedTuple):
    """Curvature of the loss, unit of loss per parameter squared.

    Attributes:
      along_gradient: () g^T H g / g^T g.
      top: () eigenvalue of largest magnitude; None where nobody asked.
      residual: () ||H v - top v|| / |top|, 0 if converged; None likewise.
    """

    along_gradient: jax.Array
    top: jax.Array | None
    residual: jax.Array | None


def gradient_line(
    loss: Loss,
    params: Any,
    batch_stats: Any,
    batch: Any,
    *,
    steps: jax.Array,
    unroll: bool = False,
) -> GradientLine:
    """Measures loss and gradient on the line that a gradient step takes.

    With g the gradient at p and g_t that at p - t g, on one and the same
    batch: predictiveness(t) = ||g_t - g||, beta(t) = ||g_t - g|| / (t ||g||)
    and cosine(t) = <g_t, g> / (||g_t|| ||g||). Steps are multiples of the
    gradient itself, as learning rates are, not of its direction.

    Networks are best compared at equal loss. At equal step one with batch norm
    and one without are at different places: without it the early gradients of
    a deep network are tiny, and so is every number here.

    The largest beta depends on the smallest step, since beta falls with t: a
    figure needs its grid.

    Args:
      loss: (params, batch_stats, batch) -> (scalar, new_batch_stats), in
        training mode. The new statistics are dropped.
      params: tree of floating arrays; moved in their own dtypes.
      batch_stats: running statistics, passed on.
      batch: passed on, the same for every probe.
      steps: (K,) positive; t = 0.5 to 4 learning rates in the paper.
      unroll: K copies of the network instead of a loop over one: slower to
        compile, faster for convolutions on CPU.

    Returns:
      GradientLine. beta and cosine are NaN where the gradient is zero.

    Raises:
      ValueError: steps are not positive or not (K,), or loss returns
        something else.

    Source: Santurkar et al. (2018), How Does Batch Normalization Help
    Optimization?, section 3.1 and figure 4.
    """
    steps = check_steps(steps)
    scalar = jax.value_and_grad(scalar_loss(loss, batch_stats, batch))
    loss0, gradient = scalar(params)
    length = norm(gradient)

    def probe(step: jax.Array) -> tuple[jax.Array, ...]:
        value, there = scalar(step_along(params, step, gradient))
        change = norm(subtract(there, gradient))
        cosine = dot(there, gradient) / (norm(there) * length)
        return value, change, change / (step * length), cosine

    return GradientLine(loss0, length, *map_rows(probe, steps, unroll=unroll))


def max_step(
    loss: Loss,
    params: Any,
    batch_stats: Any,
    batch: Any,
    *,
    steps: jax.Array,
    threshold: float = 1e3,
    unroll: bool = False,
) -> jax.Array:
    """Returns the largest step after which the loss has not exploded.

    That is the largest t of steps with L(p - t g) / L(p) < threshold, and 0 if
    there is none; a loss of NaN is never below. One backward and K forward
    passes.

    Args:
      loss, params, batch_stats, batch, unroll: as in `gradient_line`; the loss
        is positive.
      steps: (K,) positive, in any order.
      threshold: of the relative loss; the paper calls 1e3 divergence.

    Returns:
      () in the dtype of steps.

    Raises:
      ValueError: steps are not positive or not (K,), or loss returns
        something else.

    Source: Bjorck et al. (2018), Understanding Batch Normalization.
    """
    steps = check_steps(steps)
    scalar = scalar_loss(loss, batch_stats, batch)
    loss0, gradient = jax.value_and_grad(scalar)(params)
    losses = map_rows(
        lambda step: scalar(step_along(params, step, gradient)),
        steps,
        unroll=unroll,
    )
    return jnp.where(losses / loss0 < threshold, steps, 0).max()


def sharpness(
    loss: Loss,
    params: Any,
    batch_stats: Any,
    batch: Any,
    *,
    iterations: int = 0,
    key: jax.Array | None = None,
) -> Sharpness:
    """Measures the curvature along the gradient, and the largest there is.

    along_gradient = g^T H g / g^T g from one product H g, forward over
    reverse. To second order L(p - t g) falls until t = 1 / along_gradient and
    rises above L(p) after twice that. top is the Rayleigh quotient of
    power iteration from a random vector, so the eigenvalue of largest
    magnitude, of either sign; residual says whether it has converged.

    Args:
      loss, params, batch_stats, batch: as in `gradient_line`.
      iterations: of power iteration, one Hessian-vector product each; 0 leaves
        top and residual None.
      key: of the random start; needed where iterations is not 0.

    Returns:
      Sharpness. along_gradient is NaN where the gradient is zero.

    Raises:
      ValueError: iterations is negative, or positive without a key, or loss
        returns something else.

    Source: Pearlmutter (1994), Fast Exact Multiplication by the Hessian; Cohen
    et al. (2021), Gradient Descent on Neural Networks Typically Occurs at the
    Edge of Stability.
    """
    if iterations < 0:
        raise ValueError(f"iterations must not be negative; got {iterations}.")
    if iterations and key is None:
        raise ValueError(
            f"iterations={iterations} start from a random vector: give "
            "key=jax.random.key(...)."
        )
    slope = jax.grad(scalar_loss(loss, batch_stats, batch))
    # The network runs once; each product is of the linear part alone.
    gradient, hessian = jax.linearize(slope, params)
    squared = dot(gradient, gradient)
    along = dot(gradient, hessian(gradient)) / squared
    if not iterations or key is None:
        return Sharpness(along, None, None)

    def iterate(_: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        vector, _, _ = state
        image = hessian(vector)
        top = dot(vector, image)
        error = norm(jax.tree.map(lambda h, v: h - top * v, image, vector))
        return _unit(image), top, error / jnp.abs(top)

    flat, unflatten = ravel_pytree(params)
    start = unflatten(jax.random.normal(key, flat.shape, flat.dtype))
    nothing = jnp.zeros_like(along)
    state = _unit(start), nothing, nothing
    _, top, residual = jax.lax.fori_loop(0, iterations, iterate, state)
    return Sharpness(along, top, residual)


def _unit(vector: Any) -> Any:
    length = norm(vector)
    return jax.tree.map(lambda v: (v / length).astype(v.dtype), vector)
