"""Batch normalization in training: public functions with checks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxbn._affine import Spec
from jaxbn._arithmetic import widen
from jaxbn._axis_names import AxisName
from jaxbn._check_values import check_epsilon
from jaxbn._checks import (
    Axes,
    affine_rows,
    check_affine,
    check_features,
    check_ids,
    check_input,
    check_where,
    describe,
    split_axes,
)
from jaxbn._collectives import (
    Devices,
    devices_along,
    without_explicit_axes,
)
from jaxbn._formula import Constants, Renorm, train
from jaxbn._passes import Moments
from jaxbn._reduction import Reduction
from jaxbn._scope import Scope

_ALL_EXAMPLES = Scope()


def standardize(
    x: jax.Array,
    *,
    ids: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    sharing: Scope = _ALL_EXAMPLES,
    shift: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """`batch_norm` without scale and bias: (x - mean) / sqrt(var + epsilon).

    Args:
      x: (N, ..., C), floating or complex, this device's shard of the batch.
      ids, where, axis_name, sharing, shift: as in `batch_norm`.
      epsilon, feature_axis, dtype: as in `batch_norm`.

    Returns:
      (xhat, Moments): the standardized x and the statistics of all examples.

    Raises:
      ValueError: as `batch_norm`.
    """
    return batch_norm(
        x,
        ids=ids,
        where=where,
        axis_name=axis_name,
        sharing=sharing,
        shift=shift,
        epsilon=epsilon,
        feature_axis=feature_axis,
        dtype=dtype,
    )


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    ids: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name: AxisName = None,
    sharing: Scope = _ALL_EXAMPLES,
    shift: jax.Array | None = None,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes x with batch statistics.

    With mean and var = m2 / count over all included values that share
    statistics, xhat = (x - mean) / sqrt(var + epsilon) and
    y = xhat * scale + bias. Forward- and reverse-mode derivatives of any order
    go through the statistics:
    dxhat = (dx - E[dx] - xhat E[xhat dx]) / sqrt(var + epsilon). Only x and
    per-feature values are saved for the backward pass.

    Values where `where` is False are excluded from the statistics. They are
    still normalized, and differentiated accordingly; NaN or inf there acts as
    the mean, so that it affects neither output nor gradients.

    Sums are computed about `shift` in one pass over x. If they would cancel,
    because the mean is more than four standard deviations from the shift, they
    are recomputed about the mean: float32 variances are accurate to 1e-5 for
    means of up to 1e3 standard deviations, whatever the shift. On GPUs, where
    that check costs more than it saves, the shift is the mean of at least a
    sixteenth of the batch instead; sums about it never cancel.

    Across devices this takes one all-reduce forward and one backward, each of
    2C floats, plus one float forward with where or ids; on GPUs also one of C
    floats forward, for the shift. Groups use an all-gather instead, and another
    all-reduce for the moments of all examples.

    Args:
      x: (N, ..., C), floating or complex, this device's shard of the batch.
      scale: (C,), with ids also (K, C), or None for 1.
      bias: (C,), with ids also (K, C), or None for 0.
      ids: (N,) integers in [0, K). With sharing.num_ids = K, each id has its
        own statistics, and optionally its own scale and bias; otherwise all ids
        share statistics, and scale or bias is (K, C). Examples with other ids
        result in NaN, and are excluded from all statistics.
      where: bool, broadcastable to x; False excludes a value. None includes
        all.
      axis_name: name or tuple of names of the mapped axes of the batch.
        Outside any mapped axis, x is the global batch. None computes the
        statistics of x only.
      sharing: which examples along these axes share statistics.
      shift: (C,), with ids also (K, C): a value near the mean, equal on all
        devices; modules pass the running mean. It saves passes on CPUs and
        TPUs, and changes the result only by rounding. None is 0.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the feature axis or axes.
      dtype: dtype of y; None is that of x.

    Returns:
      (y, Moments): y has the shape of x. The moments are float32 or wider,
      over all examples along axis_name (for each id) whatever they share, equal
      on every device, and differentiable.

    Raises:
      ValueError: an argument does not match x; axis_name is not bound, but
        another mesh axis, or an axis of a similar name, is; or sharing does not
        divide the batch.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (32, 8, 8, 16))
      >>> y, batch = batch_norm(x, jnp.ones(16), jnp.zeros(16))
      >>> y.shape, batch.mean.shape, int(batch.count)
      ((32, 8, 8, 16), (16,), 2048)

    Source: Ioffe and Szegedy (2015), Batch Normalization, Algorithm 1.
    """
    return normalize_batch(
        x,
        scale,
        bias,
        None,
        ids=ids,
        where=where,
        axis_name=axis_name,
        sharing=sharing,
        shift=shift,
        epsilon=epsilon,
        feature_axis=feature_axis,
        dtype=dtype,
        allow_single_value=False,
    )


def normalize_batch(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    renorm: Renorm | None = None,
    *,
    ids: jax.Array | None,
    where: jax.Array | None,
    axis_name: AxisName,
    sharing: Scope,
    shift: jax.Array | None = None,
    epsilon: float,
    feature_axis: Axes,
    dtype: jax.typing.DTypeLike | None = None,
    allow_single_value: bool,
) -> tuple[jax.Array, Moments]:
    """`batch_norm`, or `batch_renorm` with renorm.

    allow_single_value: allows statistics of a single value.
    """
    check_epsilon(epsilon)
    x = check_input(x)
    features, axes = split_axes(x, feature_axis)
    if not axes and ids is not None:
        y, batch = normalize_batch(
            x[None],
            scale,
            bias,
            renorm,
            ids=jnp.asarray(ids)[None],
            where=where,
            axis_name=axis_name,
            sharing=sharing,
            shift=shift,
            epsilon=epsilon,
            feature_axis=tuple(axis + 1 for axis in features),
            dtype=dtype,
            allow_single_value=allow_single_value,
        )
        return y[0], batch
    where = check_where(where, x)
    rows = affine_rows(ids, sharing.num_ids, scale, bias, features)
    ids = check_ids(ids, rows, x, axes)
    scale, bias = check_affine(scale, bias, x, features, rows)
    if shift is not None:
        shift = check_features("shift", shift, x, features, sharing.num_ids)
    if renorm is not None:
        mean, var, *limits = renorm
        renorm = Renorm(
            check_features("running.mean", mean, x, features, sharing.num_ids),
            check_features("running.var", var, x, features, sharing.num_ids),
            *map(widen, limits),
        )
    reduction, devices = sharing.resolve(x, axes, axis_name)
    if not allow_single_value:
        _check_more_than_one_value(x, reduction, devices)
    dtype = jnp.dtype(dtype or x.dtype)
    affine = reduction._replace(num_ids=rows)
    spec = Spec(reduction, affine, devices, float(epsilon), dtype)
    run = functools.partial(train, spec, devices_along(axis_name))
    if affine.has_rows:
        # The moments are replicated.
        specs = jax.typeof(x).sharding.spec, P()
        run = without_explicit_axes(run, specs)
    constants = Constants(where, ids, shift, renorm)
    found: tuple[jax.Array, Moments] = run(x, scale, bias, constants)
    return found


def _check_more_than_one_value(
    x: jax.Array, reduction: Reduction, devices: Devices
) -> None:
    """Raises ValueError if statistics are known to be of a single value.

    Without an axis to reduce, x is intended to be one example.
    """
    values = reduction.values // reduction.chunks * devices.size
    if reduction.axes and isinstance(values, int) and values == 1:
        raise ValueError(
            f"x is {describe(x)}, so each statistic is over a single value, "
            "with variance 0: y would be bias, and the gradient of x 0. Use "
            "more examples, axis_name to synchronize, or running statistics; "
            "an array with only features is treated as one example."
        )
