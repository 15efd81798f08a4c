"""Batch renormalization and its schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbn._axis_names import AxisName
from jaxbn._batch_norm import normalize_batch
from jaxbn._check_values import check_limits
from jaxbn._checks import Axes
from jaxbn._formula import Renorm
from jaxbn._passes import Moments
from jaxbn._running import RunningStats
from jaxbn._scope import Scope

_ALL_EXAMPLES = Scope()


def batch_renorm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    running: RunningStats,
    r_max: float | jax.Array = 3.0,
    d_max: float | jax.Array = 5.0,
    ids: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    sharing: Scope = _ALL_EXAMPLES,
    shift: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` corrected towards the output of inference.

    y = (xhat r + d) * scale + bias, where xhat is standardized with the batch,
    std = sqrt(var + epsilon), and
    r = clip(std_batch / std_running, 1 / r_max, r_max),
    d = clip((mean_batch - mean_running) / std_running, -d_max, d_max).
    Within the limits y equals that of inference; with r_max = 1 and d_max = 0
    it is bitwise equal to `batch_norm`. r and d are not differentiated;
    gradients go through the batch statistics as in `batch_norm`. Groups, ghost
    batches and ids each have their own r and d.

    Args:
      x, scale, bias: as in `batch_norm`.
      running: running statistics before this batch, (C,), with ids (K, C).
      r_max: (), at least 1; see `renorm_limits` for the schedule.
      d_max: (), at least 0, in standard deviations. A complex d is clipped in
        magnitude.
      ids, where, axis_name, sharing, shift: as in `batch_norm`.
      epsilon, feature_axis, dtype: as in `batch_norm`.

    Returns:
      (y, Moments), as `batch_norm`.

    Raises:
      ValueError: as `batch_norm`; running does not have one value per feature;
        r_max or d_max is out of range.

    Source: Ioffe (2017), Batch Renormalization, Algorithm 1.
    """
    check_limits(r_max, d_max)
    return normalize_batch(
        x,
        scale,
        bias,
        Renorm(
            running.mean, running.var, jnp.asarray(r_max), jnp.asarray(d_max)
        ),
        ids=ids,
        where=where,
        axis_name=axis_name,
        sharing=sharing,
        shift=shift,
        epsilon=epsilon,
        feature_axis=feature_axis,
        dtype=dtype,
        allow_single_value=True,
    )


def renorm_limits(
    step: int | jax.Array,
    *,
    start: int = 5_000,
    r_max: float = 3.0,
    r_end: int = 40_000,
    d_max: float = 5.0,
    d_end: int = 25_000,
) -> tuple[jax.Array, jax.Array]:
    """Returns (r_max, d_max) of `batch_renorm` for a training step.

    (1, 0), plain batch norm, until step `start`; then linear, to r_max at step
    r_end and to d_max at step d_end; then constant.

    Args:
      step: (), number of previous steps.
      start: number of steps of plain batch norm.
      r_max: final value of r_max, at least 1.
      r_end: step at which r_max is reached, after start.
      d_max: final value of d_max, at least 0.
      d_end: step at which d_max is reached, after start.

    Returns:
      Two float32 arrays, ().

    Source: Ioffe (2017), Batch Renormalization, section 4.2, whose values are
    the defaults.
    """

    def ramp(end: int) -> jax.Array:
        return jnp.clip((step - start) / max(end - start, 1), 0, 1)

    return 1 + (r_max - 1) * ramp(r_end), d_max * ramp(d_end)
