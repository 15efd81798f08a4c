"""Normalization with given statistics, for inference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbn._affine import (
    Spec,
    affine,
    per_affine_row,
    tile_rows,
    zero_masked_nonfinite,
)
from jaxbn._arithmetic import abs2, plus, times, widen
from jaxbn._check_values import check_between, check_epsilon
from jaxbn._checks import (
    Axes,
    affine_rows,
    check_affine,
    check_features,
    check_ids,
    check_input,
    check_where,
    split_axes,
)
from jaxbn._collectives import THIS_DEVICE, without_explicit_axes
from jaxbn._moments import moments
from jaxbn._reduction import Reduction


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
    ids: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Returns (x - mean) / sqrt(var + epsilon) * scale + bias.

    Computed in float32 or wider and rounded once.

    Args:
      x: (N, ..., C), floating or complex.
      mean: (C,) in the unit of x; with ids also (K, C).
      var: (C,) in the unit of x squared; with ids also (K, C).
      scale: (C,), with ids also (K, C), or None for 1.
      bias: likewise, or None for 0.
      where: bool, broadcastable to x; NaN or inf where it is False is replaced
        by the mean, so that it affects neither the result nor gradients.
      ids: (N,) integers in [0, K) that select the row of mean and var, of scale
        and bias, or of both, for each example; other ids result in NaN.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the feature axis or axes.
      dtype: dtype of the result; None is that of x.

    Returns:
      Array of the shape of x.

    Raises:
      ValueError: x is not floating, or a statistic or parameter does not have
        one value per feature.

    Source: Ioffe and Szegedy (2015), Batch Normalization, Algorithm 2.
    """
    check_epsilon(epsilon)
    x = check_input(x)
    features, axes = split_axes(x, feature_axis)
    if not axes and ids is not None:
        return normalize(
            x[None],
            mean,
            var,
            scale,
            bias,
            where=where,
            ids=jnp.asarray(ids)[None],
            epsilon=epsilon,
            feature_axis=tuple(axis + 1 for axis in features),
            dtype=dtype,
        )[0]
    where = check_where(where, x)
    num_ids = _statistics_rows(ids, mean, features)
    rows = affine_rows(ids, num_ids, scale, bias, features)
    ids = check_ids(ids, rows, x, axes)
    mean = check_features("mean", mean, x, features, num_ids)
    var = check_features("var", var, x, features, num_ids)
    scale, bias = check_affine(scale, bias, x, features, rows)
    reduction = Reduction(x.shape, axes, num_ids=num_ids)
    dtype = jnp.dtype(dtype or x.dtype)
    spec = Spec(
        reduction,
        reduction._replace(num_ids=rows),
        THIS_DEVICE,
        float(epsilon),
        dtype,
    )
    centered = widen(x) - reduction.broadcast(widen(mean), ids)
    centered = zero_masked_nonfinite(x, where, centered)
    inv = per_affine_row(spec, jax.lax.rsqrt(widen(var) + spec.epsilon))
    slope = times(inv, tile_rows(spec.affine, scale))
    return affine(spec, centered, slope, tile_rows(spec.affine, bias), ids)


def _statistics_rows(
    ids: jax.Array | None, mean: jax.Array, features: tuple[int, ...]
) -> int | None:
    """Returns K if mean is (K, C), one row per id."""
    shape = jnp.shape(mean)
    has_rows = ids is not None and len(shape) > len(features)
    return shape[0] if has_rows else None


def normalize_weighted(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    weight: float | jax.Array,
    where: jax.Array | None = None,
    ids: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`normalize` with inference example weighing.

    In training, an example contributes to the statistics it is normalized
    with; in inference it does not. With mean_i and var_i over the values
    (pixels) of example i and a = weight,
    mean' = (1 - a) mean + a mean_i and
    var' = (1 - a) var + a var_i + a (1 - a) |mean_i - mean|^2,
    the paper's moments, written without cancellation. weight = 0 is
    `normalize`, weight = 1 instance normalization.

    Args:
      x, mean, var, scale, bias: as in `normalize`.
      weight: (), in [0, 1], weight of an example in its own statistics. Choose
        it on held-out data; in training it is 1 / batch size.
      where: bool, broadcastable to x; False excludes a value from the
        statistics of its example. An example without values uses mean and var.
      ids, epsilon, feature_axis, dtype: as in `normalize`.

    Returns:
      Array of the shape of x.

    Raises:
      ValueError: as `normalize`; weight is outside [0, 1].

    Source: Summers and Dinneen (2019), Four Things Everyone Should Know to
    Improve Batch Normalization, on inference example weighing.
    """
    check_between("weight", weight, 0, 1)
    check_epsilon(epsilon)
    x = check_input(x)
    features, axes = split_axes(x, feature_axis)
    if not axes:
        return normalize_weighted(
            x[None],
            mean,
            var,
            scale,
            bias,
            weight=weight,
            where=where,
            ids=None if ids is None else jnp.asarray(ids)[None],
            epsilon=epsilon,
            feature_axis=tuple(axis + 1 for axis in features),
            dtype=dtype,
        )[0]
    where = check_where(where, x)
    num_ids = _statistics_rows(ids, mean, features)
    rows = affine_rows(ids, num_ids, scale, bias, features)
    ids = check_ids(ids, rows, x, axes)
    mean = check_features("mean", mean, x, features, num_ids)
    var = check_features("var", var, x, features, num_ids)
    scale, bias = check_affine(scale, bias, x, features, rows)
    examples = axes[0]
    # Each example becomes a batch of one, with a new first axis.
    inner = tuple(f + 1 if f < examples else f for f in features)

    def one(
        x: jax.Array,
        where: jax.Array | None,
        mean: jax.Array,
        var: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
    ) -> jax.Array:
        x, where = x[None], None if where is None else where[None]
        own = moments(x, where=where, feature_axis=inner)
        a = jnp.where(own.count > 0, weight, 0).astype(own.m2.dtype)
        mean, var = widen(mean), widen(var)
        gap = plus(own.mean, -mean)
        mean = plus(mean, times(gap, a))
        between = times(abs2(gap), a * (1 - a))
        var = plus(times(var, 1 - a), plus(times(own.var, a), between))
        return normalize(
            x,
            mean,
            var,
            scale,
            bias,
            where=where,
            epsilon=epsilon,
            feature_axis=inner,
            dtype=dtype,
        )[0]

    def run(
        x: jax.Array,
        where: jax.Array | None,
        parameters: tuple[jax.Array | None, ...],
        ids: jax.Array | None,
    ) -> jax.Array:
        def row(
            value: jax.Array | None,
        ) -> tuple[jax.Array | None, int | None]:
            """Returns the row of each example, and its vmap axis."""
            if value is None or ids is None or value.ndim == len(features):
                return value, None
            known = jnp.where(ids < 0, len(value), ids)
            return value.at[known].get(mode="fill", fill_value=jnp.nan), 0

        if where is not None:
            where = jnp.broadcast_to(where, x.shape)
        each = [(v, None if v is None else examples) for v in (x, where)]
        values, in_axes = zip(*each, *map(row, parameters))
        y: jax.Array = jax.vmap(one, in_axes, examples)(*values)
        return y

    run = without_explicit_axes(run, jax.typeof(x).sharding.spec)
    return run(x, where, (mean, var, scale, bias), ids)
