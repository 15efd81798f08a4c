"""Batch normalization in training: the functions and their checks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxbn._affine import Spec, without_explicit_axes
from jaxbn._arithmetic import widen
from jaxbn._checks import (
    Axes,
    AxisName,
    affine_rows,
    check_affine,
    check_epsilon,
    check_features,
    check_ids,
    check_input,
    check_where,
    describe,
    split_axes,
)
from jaxbn._collectives import Devices, devices_along
from jaxbn._formula import (
    Constants,
    Renorm,
    train,
)
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
      x: (N, ..., C), floating or complex: this device's part of the batch.
      ids, where, axis_name, sharing, shift: as in `batch_norm`.
      epsilon, feature_axis, dtype: likewise.

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
    """Normalizes x with the statistics of its own batch.

    With mean and var = m2 / count over all kept values that share statistics,
    xhat = (x - mean) / sqrt(var + epsilon) and y = xhat * scale + bias.
    Derivatives go through the statistics, forward and reverse, to any order:
    dxhat = (dx - E[dx] - xhat E[xhat dx]) / sqrt(var + epsilon). Only x and
    one value a feature are kept for the backward pass.

    Where `where` is False a value enters no statistic. Its output is still
    normalized, with the derivative that follows; a NaN or inf there is read as
    the mean, so that it reaches neither output nor gradient.

    Sums are taken about `shift` in one pass over x. Where they would cancel,
    because the mean lies more than four standard deviations from it, they are
    taken again about the mean: float32 then holds the variance to 1e-5 for a
    mean of up to 1e3 standard deviations, whatever the shift. On GPUs, where
    asking costs more than it saves, the shift is the mean of at least a
    sixteenth of the batch instead, and no sum about that cancels.

    Over devices this is one all-reduce forward and one backward, each of 2C
    floats, and one more float forward with where or ids; on GPUs also one of C
    floats forward, for the shift. Groups gather in place of reducing, and take
    one more all-reduce for the moments of all.

    Args:
      x: (N, ..., C), floating or complex: this device's part of the batch.
      scale: (C,), with ids also (K, C), or None for 1.
      bias: likewise, or None for 0.
      ids: (N,) integers in [0, K). With sharing.num_ids = K each id has its own
        statistics, and may have its own scale and bias; without, ids share
        statistics, and scale or bias is (K, C). An example with another id
        has the output NaN, and enters the statistics of no id.
      where: bool, broadcastable to x; False leaves a value out. None keeps
        all.
      axis_name: name, or tuple of names, of the mapped axes the batch lies
        on. Outside any mapped axis x is already the whole batch. None takes
        the statistics of x alone.
      sharing: which examples on these axes share statistics.
      shift: (C,), with ids also (K, C): a value near the mean that is the same
        on all devices; modules pass their running mean. It saves passes on
        CPUs and TPUs, and changes the result by rounding alone. None is 0.
      epsilon: added to the variance, unit of x squared.
      feature_axis: the axis, or axes, that hold the features.
      dtype: of y; None takes that of x.

    Returns:
      (y, Moments): y has the shape of x. The moments are float32 or wider, of
      all examples along axis_name whatever they share, of each id, the same on
      every device, and differentiable.

    Raises:
      ValueError: an argument does not fit x, or axis_name is not bound though
        another named axis is, or sharing does not divide the batch.

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

    allow_single_value: whether statistics of a single value are of use.
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
        run = without_explicit_axes(run, x)
    constants = Constants(where, ids, shift, renorm)
    found: tuple[jax.Array, Moments] = run(x, scale, bias, constants)
    return found


def _check_more_than_one_value(
    x: jax.Array, reduction: Reduction, devices: Devices
) -> None:
    """Raises where it is known that statistics are those of a single value.

    Features alone have no axis to reduce: they are one example on purpose.
    """
    values = reduction.values // reduction.chunks * devices.size
    if reduction.axes and isinstance(values, int) and values == 1:
        raise ValueError(
            f"x is {describe(x)}, so each statistic is of one value, whose "
            "variance is 0: y would be bias, and the gradient of x 0. Give "
            "more examples, or axis_name to synchronize, or normalize with the "
            "running statistics; features without an axis of examples are "
            "taken as one."
        )
