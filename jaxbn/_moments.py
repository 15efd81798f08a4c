"""Count, mean and summed squared deviation of a batch, on any devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._checks import (
    Axes,
    AxisName,
    check_input,
    check_where,
    split_axes,
)
from jaxbn._collectives import (
    THIS_DEVICE,
    Devices,
    all_agree,
    all_sum,
    devices_along,
    microbatches_among,
)
from jaxbn._compat import match_type, vary_over, varying_axes
from jaxbn._reduction import Reduction

# Squared distance of the mean from the shift, in variances, up to which sums
# about the shift are exact enough: with u = 2^-24 they cost the variance about
# (1 + 3 * 16) u = 3e-6, plus what the sums round.
_LARGEST_SHIFT = 16


class Moments(NamedTuple):
    """Summary of a batch, one entry a feature; parts merge exactly.

    With ids, one row an id: mean and m2 are (K, C), count (K, 1) or (K, C).

    Attributes:
      count: () or (C,) kept values; () when every feature keeps the same ones.
      mean: (C,) in the unit of x; 0 where nothing is kept.
      m2: (C,) summed squared deviation from the mean, unit of x squared.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    m2: jax.Array

    @property
    def var(self) -> jax.Array:
        """Biased variance m2 / count, (C,); 0 where nothing is kept."""
        var: jax.Array = self.m2 / nonzero(self.count)
        return var


class Centered(NamedTuple):
    """Moments with the mean in two parts, shift + offset.

    One float cannot hold the mean of a batch whose standard deviation is
    thousands of times smaller. Two can: (x - shift) - offset is then exact.
    """

    count: jax.Array  # type: ignore[assignment]
    shift: jax.Array
    offset: jax.Array
    m2: jax.Array

    @property
    def mean(self) -> jax.Array:
        return self.shift + self.offset

    @property
    def var(self) -> jax.Array:
        var: jax.Array = self.m2 / nonzero(self.count)
        return var

    @property
    def moments(self) -> Moments:
        return Moments(jnp.asarray(self.count), self.mean, self.m2)


class Passes(NamedTuple):
    """How `centered_moments` sums; static while tracing."""

    # (values, constants, shift) -> local count, sum of d and sum of |d|^2, with
    # d = values - shift. The count is a numpy array where it is static.
    sums: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array]]
    # (values, constants) -> local count and sum of one value in 16, or more.
    sample: Callable[[Any, Any], tuple[Any, jax.Array]]
    devices: Devices = THIS_DEVICE  # to sum over
    epsilon: float = 0.0  # digits of the variance far below it do not matter


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def centered_moments(
    passes: Passes, values: Any, constants: Any, shift: jax.Array
) -> Any:
    """Moments from one pass of sums about a shift that all devices know.

    mean = shift + s1 / n and m2 = s2 - |s1|^2 / n. The difference cancels where
    the mean lies many standard deviations from the shift. How that is avoided
    depends on the platform; no way is less exact than two passes.

    Where the shift is given, sums can fuse into what computes the values, and
    one collective is enough: the way of TPUs and CPUs, see `_about_shift`. On
    GPUs nothing fuses into a convolution, and a conditional costs 36 us, in
    which the host is asked for the branch: there the shift is the mean of a
    sample, see `_about_sample`. Microbatches in lockstep take the first way
    everywhere: another sum over them would be another sweep.

    Source: Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample
    Variance: shifted data, and the corrected two-pass algorithm.
    """
    about_shift = functools.partial(_about_shift, passes)
    if microbatches_among(passes.devices) is not None:
        return about_shift(values, constants, shift)
    about_sample = functools.partial(_about_sample, passes)
    return jax.lax.platform_dependent(
        *(values, constants, shift),
        cuda=about_sample,
        rocm=about_sample,
        default=about_shift,
    )


def _about_shift(
    passes: Passes, values: Any, constants: Any, shift: jax.Array
) -> Centered:
    """Sums about the shift, and about the mean where these have cancelled.

    Whether they have is read off the sums, which are those of all devices, so
    that all agree; only then the sums are taken again, about the mean just
    found. Thus the ordinary case costs what E[x^2] - E[x]^2 costs. Where vmap
    maps the statistics, both passes run.
    """
    sums, _, devices, epsilon = passes
    if varying_axes(shift) & set(devices.names):
        # Each device has its own, as running statistics that never were pooled.
        shift = jnp.zeros(shift.shape, shift.dtype)
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    found = all_sum(sums(values, constants, shift), devices)
    # Both branches below return one type, that of the sums. What they read
    # varies over the same axes: where vmap makes a select of the conditional,
    # JAX leaves no other type right.
    count = found[0]
    if varying := varying_axes(found[1]):
        count, values, constants = jax.tree.map(
            lambda a: vary_over(jnp.asarray(a), varying),
            (count, values, constants),
        )
    shift = match_type(shift, found[1])
    first = _from_sums(count, shift, *found[1:])

    def again(shift: jax.Array, offset: jax.Array, _: jax.Array) -> Any:
        mean = shift + offset
        s1, s2 = all_sum(sums(values, constants, mean)[1:], devices)
        return _from_sums(count, mean, s1, s2)[1:]

    cancels = all_agree(_cancels(first, epsilon), devices)
    # Not a loop: TPUs would copy the values before it, run or not.
    best = jax.lax.cond(cancels, again, lambda *first: first, *first[1:])
    return Centered(jnp.asarray(found[0]), *best)


def _about_sample(
    passes: Passes, values: Any, constants: Any, _: jax.Array
) -> Centered:
    """Sums about the mean of a sample, which never cancel.

    Where a share f of the values has the mean s, the variance of all is at
    least f (mean - s)^2. So with f = 1/16 the mean lies at most four standard
    deviations from s, whatever the values are, and there is nothing to check.
    """
    count, total = all_sum(passes.sample(values, constants), passes.devices)
    total, count = promoted(total, nonzero(count))
    shift = total / count
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    found = all_sum(passes.sums(values, constants, shift), passes.devices)
    shift = match_type(shift, found[1])
    return _from_sums(jnp.asarray(found[0]), shift, *found[1:])


@centered_moments.defjvp
def _centered_moments_jvp(
    passes: Passes, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    values, constants, shift = primals
    found = centered_moments(passes, values, constants, shift)

    def tangent(values: Any, found: Centered, tangents: Any) -> Any:
        def sums(values: Any) -> Any:
            return passes.sums(values, constants, found.shift)[1:]

        local = jax.jvp(sums, (values,), (tangents,))[1]
        return mean_and_m2(found, *all_sum(local, passes.devices))

    # Nothing wider than the values is kept for the backward pass.
    linear = jax.checkpoint(tangent, prevent_cse=False)
    moved = linear(values, found, tangents[0])
    zero = jnp.zeros_like(found.count), jnp.zeros_like(found.shift)
    return found, Centered(*zero, *moved)


def mean_and_m2(
    found: Centered, ds1: jax.Array, ds2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Derivatives of mean and m2 from those of the sums about found.shift."""
    ds1, count = promoted(ds1, nonzero(found.count))
    return ds1 / count, ds2 - 2 * inner(found.offset, ds1)


def _from_sums(
    count: Any, shift: jax.Array, s1: jax.Array, s2: jax.Array
) -> Centered:
    # Where the sum overflows, so do the squares, and any mean will do.
    total, n = promoted(s1, nonzero(count))
    offset = jnp.where(jnp.isinf(s1), 0, total / n)
    # inf where s2 is, never inf - inf.
    between = count * abs2(offset)
    m2 = jnp.where(jnp.isinf(s2), s2, jnp.maximum(s2 - between, 0))
    return Centered(count, shift, offset, m2)


def _cancels(found: Centered, epsilon: float) -> jax.Array:
    """Whether a variance may have lost digits; False where it is NaN."""
    # x itself is not known better than this.
    eps = float(jnp.finfo(found.m2.dtype).eps)
    rounding = abs2(found.shift * eps)
    far = abs2(found.offset) > _LARGEST_SHIFT * (found.var + epsilon + rounding)
    return (far | (jnp.isinf(found.m2) & (found.offset != 0))).any()


@functools.partial(jax.jit, static_argnames=("reduction", "devices", "epsilon"))
def batch_moments(
    x: jax.Array,
    shift: jax.Array | None,
    where: jax.Array | None,
    ids: jax.Array | None,
    *,
    reduction: Reduction,
    devices: Devices = THIS_DEVICE,
    epsilon: float = 0.0,
) -> Centered:
    """Moments of x behind its checks; shift has rows where they have."""
    dtype = widen(x).dtype
    if shift is None:
        shift = jnp.zeros((*reduction.rows, *reduction.features), dtype)
    if jnp.iscomplexobj(shift) and not jnp.iscomplexobj(x):
        shift = shift.real
    shift = shift.astype(dtype)

    def sums(x: jax.Array, constants: Any, shift: jax.Array) -> Any:
        where, ids = constants

        def centered(shift: jax.Array) -> jax.Array:
            d = widen(x) - reduction.broadcast(shift, ids)
            return d if where is None else jnp.where(where, d, 0)

        count = reduction.counts(where, ids, shift.real.dtype)
        s1 = reduction.sum(centered(shift), ids)
        s2 = reduction.sum(abs2(centered(hide_from_cse(shift))), ids)
        return count, s1, s2

    def sample(x: jax.Array, constants: Any) -> Any:
        where, ids = constants
        part, x, where = reduction.sample(x, where, _LARGEST_SHIFT)
        x = widen(x) if where is None else jnp.where(where, widen(x), 0)
        return part.counts(where, ids, shift.real.dtype), part.sum(x, ids)

    passes = Passes(sums, sample, devices, epsilon)
    found: Centered = centered_moments(passes, x, (where, ids), shift)
    return found


@functools.partial(jax.jit, static_argnames="devices")
def merge_parts(
    parts: Centered, shift: jax.Array, *, devices: Devices = THIS_DEVICE
) -> Centered:
    """Merges along the first axis and over devices, in one collective."""

    def sums(parts: Centered, _: None, shift: jax.Array) -> Any:
        count, start, offset, m2 = parts
        weight = count.reshape(count.shape + (1,) * (start.ndim - count.ndim))
        d = jnp.where(weight > 0, (start - shift[None]) + offset, 0)
        s2 = m2 + weight * abs2(d)
        return count.sum(0), times(d, weight).sum(0), s2.sum(0)

    def sample(parts: Centered, _: None) -> Any:
        count, start, offset = parts[:3]
        weight = count.reshape(count.shape + (1,) * (start.ndim - count.ndim))
        mean = jnp.where(weight > 0, start + offset, 0)
        return count.sum(0), times(mean, weight).sum(0)

    passes = Passes(sums, sample, devices)
    found: Centered = centered_moments(passes, parts, None, shift)
    return found


def moments(
    x: jax.Array, *, where: jax.Array | None = None, feature_axis: Axes = -1
) -> Moments:
    """Reduces every axis of x but the features.

    m2 is the sum of squared deviations. Sums are taken about zero, and about
    the mean where those would cancel: where mean^2 is above 16 variances.
    E[x^2] - E[x]^2 alone loses all digits once the mean is some thousand
    standard deviations.

    Args:
      x: (..., C), floating or complex, any unit.
      where: bool, broadcastable to x; False drops a value, even NaN or inf.
        None keeps all.
      feature_axis: the axis, or axes, that are not reduced.

    Returns:
      Moments in float32, or wider where x is; m2 is real.

    Raises:
      ValueError: x is not floating, where does not fit, or feature_axis is
        not an axis of x.

    Source: Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample
    Variance.
    """
    x = check_input(x)
    _, axes = split_axes(x, feature_axis)
    where = check_where(where, x)
    reduction = Reduction(x.shape, axes)
    found: Centered = batch_moments(x, None, where, None, reduction=reduction)
    return found.moments


def sync(
    local: Moments,
    *,
    axis_name: AxisName,
    shift: jax.Array | None = None,
) -> Moments:
    """Merges the moments of all devices along named axes.

    With d_i = mean_i - shift and n = sum n_i, one all-reduce of 2C+1 floats
    gives mean = shift + sum n_i d_i / n and
    m2 = sum (m2_i + n_i |d_i|^2) - |sum n_i d_i|^2 / n. Where that difference
    would cancel, it is taken again about the mean just found, in a second
    all-reduce. So the shift never changes the result beyond rounding.

    Args:
      local: moments of this device's part; its count may be 0.
      axis_name: name, or tuple of names, of the mapped axes to reduce over.
        Not bound and no named axis in scope: local is already global.
      shift: (C,), the same on all devices: a value near the mean, such as the
        running mean. None is 0.

    Returns:
      Moments of all parts together, equal on all devices.

    Raises:
      ValueError: axis_name is not bound though another named axis is.

    Source: Chan, Golub, LeVeque (1979), Updating Formulae.
    """
    devices = devices_along(axis_name)
    if not devices.names:
        return local
    parts = stack_parts(local)
    if shift is None:
        shift = jnp.zeros(local.mean.shape, local.mean.dtype)
    found: Centered = merge_parts(parts, shift, devices=devices)
    return found.moments


def merge(*parts: Moments) -> Moments:
    """Merges the moments of disjoint parts into those of their union.

    With n = sum n_i and mean = sum n_i mean_i / n,
    m2 = sum m2_i + n_i |mean_i - mean|^2. Empty parts change nothing.

    Args:
      *parts: one or more Moments of the same features.

    Returns:
      Moments of all values together.

    Raises:
      ValueError: no part is given.

    Example:
      >>> a, b = jnp.arange(6.0).reshape(3, 2), jnp.ones((5, 2))
      >>> together = merge(moments(a), moments(b))
      >>> whole = moments(jnp.concatenate([a, b]))
      >>> bool(jnp.allclose(together.m2, whole.m2))
      True

    Source: Chan, Golub, LeVeque (1979), Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances.
    """
    if not parts:
        raise ValueError("merge needs at least one Moments; got none.")
    return merge_stacked(stack_parts(*parts)).moments


def stack_parts(*parts: Moments) -> Centered:
    """Stacks Moments along a new first axis."""
    stacked = [jnp.stack(jnp.broadcast_arrays(*field)) for field in zip(*parts)]
    count, mean, m2 = stacked
    return Centered(count.astype(m2.dtype), mean, jnp.zeros_like(mean), m2)


def merge_stacked(parts: Centered) -> Centered:
    """Merges along the first axis, about the mean of the largest part.

    So equal means stay equal to the last bit.
    """
    count = parts.count
    largest = jax.nn.one_hot(
        jnp.argmax(count, 0), len(count), axis=0, dtype=bool
    )
    largest = largest.reshape(
        largest.shape + (1,) * (parts.shift.ndim - count.ndim)
    )
    shift = jnp.where(largest, parts.shift, 0).sum(0)
    found: Centered = merge_parts(parts, shift)
    return found


def hide_from_cse(statistics: Any) -> Any:
    """Returns the same values, which compilers take for others.

    What x and a statistic make in two places is then computed in both, and not
    once, stored and read again: arithmetic is cheap and memory traffic is not.
    """
    return jax.lax.optimization_barrier(statistics)


def nonzero(count: Any) -> Any:
    """Returns count with 1 for 0, to divide by; static where count is."""
    if isinstance(count, np.ndarray):
        return np.where(count > 0, count, count.dtype.type(1))
    return jnp.where(count > 0, count, 1)


def promoted(*values: Any) -> Any:
    """Returns values cast to the dtype of their product; all are wide.

    Explicit casts also work under `jax_numpy_dtype_promotion="strict"`.
    """
    dtypes = [value.dtype for value in values]
    dtype = functools.reduce(np.promote_types, dtypes)
    return [value.astype(dtype) for value in values]


def times(a: jax.Array, b: jax.Array | None) -> jax.Array:
    """Returns a * b, where None stands for 1."""
    if b is None:
        return a
    a, b = promoted(a, b)
    return a * b


def plus(a: jax.Array, b: jax.Array | None) -> jax.Array:
    """Returns a + b, where None stands for 0."""
    if b is None:
        return a
    a, b = promoted(a, b)
    return a + b


def widen(x: jax.Array) -> jax.Array:
    """Returns x in float32 or wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def abs2(x: jax.Array) -> jax.Array:
    """Returns |x|^2, which is real."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the real inner product of two numbers."""
    return (a * b.conj()).real if jnp.iscomplexobj(a) else a * b
