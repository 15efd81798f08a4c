"""The loss landscape along the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxbn.diagnostics._model import Loss, check_steps, map_rows, scalar_loss
from jaxbn.diagnostics._trees import dot, norm, step_along, subtract


class GradientLine(NamedTuple):
    """Loss and gradient at params - t * gradient, for each step t.

    Attributes:
      loss0: () at params.
      gradient_norm: () of the gradient g at params.
      loss: (K,) L(p - t g).
      predictiveness: (K,) ||g(p - t g) - g||; smaller is more predictive.
      beta: (K,) predictiveness / (t ||g||), effective smoothness.
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
        """Maximum minus minimum loss on the line, ()."""
        return self.loss.max(-1) - self.loss.min(-1)

    @property
    def effective_beta(self) -> jax.Array:
        """Maximum beta on the line, (); depends on the smallest step."""
        return self.beta.max(-1)


class Sharpness(NamedTuple):
    """Curvature of the loss, unit of loss per parameter squared.

    Attributes:
      along_gradient: () g^T H g / g^T g.
      top: () eigenvalue of largest magnitude, or None.
      residual: () ||H v - top v|| / |top|, 0 if converged, or None.
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
    """Measures loss and gradient along a gradient step.

    With g the gradient at p and g_t the gradient at p - t g, on the same batch:
    predictiveness(t) = ||g_t - g||, beta(t) = ||g_t - g|| / (t ||g||) and
    cosine(t) = <g_t, g> / (||g_t|| ||g||). Like learning rates, steps multiply
    the gradient itself, not its direction.

    Compare networks at equal loss rather than at equal step: without batch norm
    the early gradients of a deep network are tiny, and so are all values here.

    The maximum of beta depends on the smallest step, since beta decreases with
    t: report it together with the steps.

    Args:
      loss: (params, batch_stats, batch) -> (scalar, new_batch_stats), in
        training mode. The new statistics are discarded.
      params: tree of floating arrays.
      batch_stats: running statistics, passed to loss.
      batch: passed to loss.
      steps: (K,) positive; 0.5 to 4 times the learning rate in the paper.
      unroll: unrolls the loop over steps: slower to compile, faster for
        convolutions on CPU.

    Returns:
      GradientLine. beta and cosine are NaN if the gradient is zero.

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
    """Returns the largest step after which the loss has not diverged.

    The largest t in steps with L(p - t g) / L(p) < threshold, or 0 if there is
    none; a NaN loss counts as diverged. Takes one backward and K forward
    passes.

    Args:
      loss, params, batch_stats, batch, unroll: as in `gradient_line`; the loss
        is positive.
      steps: (K,) positive, in any order.
      threshold: relative loss that counts as divergence; 1e3 in the paper.

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
    """Measures the curvature along the gradient, and its maximum.

    along_gradient = g^T H g / g^T g, from one forward-over-reverse product H g.
    To second order, L(p - t g) is minimal at t = 1 / along_gradient and exceeds
    L(p) after twice that. top is the Rayleigh quotient of power iteration from
    a random vector: the eigenvalue of largest magnitude, of either sign;
    residual measures its convergence.

    Args:
      loss, params, batch_stats, batch: as in `gradient_line`.
      iterations: iterations of power iteration, each a Hessian-vector product;
        with 0, top and residual are None.
      key: random key of the initial vector; required unless iterations is 0.

    Returns:
      Sharpness. along_gradient is NaN if the gradient is zero.

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
            f"iterations={iterations} needs a random initial vector: pass "
            "key=jax.random.key(...)."
        )
    slope = jax.grad(scalar_loss(loss, batch_stats, batch))
    # Linearize once; each product only runs the linear part.
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
