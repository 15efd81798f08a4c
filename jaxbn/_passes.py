"""Computes moments from sums about a shift, and their derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import abs2, inner, nonzero, promoted
from jaxbn._collectives import (
    THIS_DEVICE,
    Devices,
    all_agree,
    all_sum,
    microbatch_axis,
    without_explicit_axes,
)
from jaxbn._compat import match_type, vary_over, varying_axes

# Maximum squared distance of the mean from the shift, in variances. With
# u = 2^-24, sums about the shift add a relative error of about
# (1 + 3 * 16) u = 3e-6 to the variance, besides the rounding of sums.
LARGEST_SHIFT = 16


class Moments(NamedTuple):
    """Per-feature summary of a batch; moments of parts merge exactly.

    With ids, one row per id: mean and m2 are (K, C), count (K, 1) or (K, C).

    Attributes:
      count: () or (C,) number of values; () if equal for all features.
      mean: (C,) in the unit of x; 0 without values.
      m2: (C,) sum of squared deviations from the mean, unit of x squared.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    m2: jax.Array

    @property
    def var(self) -> jax.Array:
        """Biased variance m2 / count, (C,); 0 without values."""
        var: jax.Array = self.m2 / nonzero(self.count)
        return var


class Centered(NamedTuple):
    """Moments with the mean split into shift + offset.

    A single float cannot represent the mean accurately if the standard
    deviation is thousands of times smaller; (x - shift) - offset is accurate.
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
    """The sums used by `centered_moments`; static while tracing."""

    # (values, constants, shift) -> local count, sum of d and sum of |d|^2, with
    # d = values - shift. The count is a numpy array where it is static.
    sums: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array]]
    # (values, constants) -> local count and sum of at least 1/16 of the values.
    sample: Callable[[Any, Any], tuple[Any, jax.Array]]
    devices: Devices = THIS_DEVICE  # to sum over
    epsilon: float = 0.0  # tolerates cancellation far below it


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def centered_moments(
    passes: Passes, values: Any, constants: Any, shift: jax.Array
) -> Any:
    """Moments from one pass of sums about a shift that all devices know.

    mean = shift + s1 / n and m2 = s2 - |s1|^2 / n. The difference cancels where
    the mean is many standard deviations from the shift. How that is avoided
    depends on the platform; either way is as accurate as two passes.

    With a given shift, sums can fuse into the producer of the values, and one
    collective is enough: used on TPUs and CPUs, see `_about_shift`. On GPUs,
    nothing fuses into convolutions, and a conditional costs 36 us to
    synchronize with the host: there the shift is the mean of a sample, see
    `_about_sample`. Microbatches in lockstep always use the given shift, since
    another sum would need another sweep over them.

    Source: Chan, Golub, LeVeque (1983), Algorithms for Computing the Sample
    Variance: shifted data, and the corrected two-pass algorithm.
    """
    about_shift = functools.partial(_about_shift, passes)
    if microbatch_axis(passes.devices) is not None:
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
    """Sums about the shift, and about the mean if those cancel.

    Cancellation is detected from the global sums, so that all devices agree;
    only then the sums are recomputed about the mean. So the common case costs
    as much as E[x^2] - E[x]^2. If vmap maps the statistics, both passes run.
    """
    sums, _, devices, epsilon = passes
    if varying_axes(shift) & set(devices.names):
        # Devices have shifts of their own, such as unpooled running statistics.
        shift = jnp.zeros(shift.shape, shift.dtype)
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    found = all_sum(sums(values, constants, shift), devices)
    # Both branches below must return the type of the sums, and their inputs
    # must vary over the same axes: vmap may turn the conditional into a select.
    count = found[0]
    if varying := varying_axes(found[1]):
        count, values, constants = jax.tree.map(
            lambda a: vary_over(jnp.asarray(a), varying),
            (count, values, constants),
        )
    shift = match_type(shift, found[1])
    first = _from_sums(count, shift, *found[1:])

    def choose(cancels: jax.Array, given: Any, first: Any) -> Any:
        count, values, constants = given

        def again(shift: jax.Array, offset: jax.Array, _: jax.Array) -> Any:
            mean = shift + offset
            s1, s2 = all_sum(sums(values, constants, mean)[1:], devices)
            return _from_sums(count, mean, s1, s2)[1:]

        # Not a while_loop: TPUs would copy the values before it even if not
        # run.
        return jax.lax.cond(cancels, again, lambda *first: first, *first)

    cancels = all_agree(_cancels(first, epsilon), devices)
    specs = tuple(jax.typeof(a).sharding.spec for a in first[1:])
    choose = without_explicit_axes(choose, specs)
    best = choose(cancels, (count, values, constants), first[1:])
    return Centered(jnp.asarray(found[0]), *best)


def _about_sample(
    passes: Passes, values: Any, constants: Any, _: jax.Array
) -> Centered:
    """Sums about the mean of a sample, which never cancel.

    If a fraction f of the values has mean s, the variance of all values is at
    least f (mean - s)^2. So with f = 1/16, the mean is always within four
    standard deviations of s, and no check is needed.
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

    # Saves nothing wider than the values for the backward pass.
    linear = jax.checkpoint(tangent, prevent_cse=False)
    moved = linear(values, found, tangents[0])
    zero = jnp.zeros_like(found.count), jnp.zeros_like(found.shift)
    return found, Centered(*zero, *moved)


def mean_and_m2(
    found: Centered, ds1: jax.Array, ds2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns tangents of mean and m2 from those of the sums."""
    ds1, count = promoted(ds1, nonzero(found.count))
    return ds1 / count, ds2 - 2 * inner(found.offset, ds1)


def _from_sums(
    count: Any, shift: jax.Array, s1: jax.Array, s2: jax.Array
) -> Centered:
    # If the sum overflows, so do the squares, and the mean does not matter.
    total, n = promoted(s1, nonzero(count))
    offset = jnp.where(jnp.isinf(s1), 0, total / n)
    # inf if s2 is inf, never inf - inf.
    between = count * abs2(offset)
    m2 = jnp.where(jnp.isinf(s2), s2, jnp.maximum(s2 - between, 0))
    return Centered(count, shift, offset, m2)


def _cancels(found: Centered, epsilon: float) -> jax.Array:
    """Whether a variance may have cancelled; False for NaN."""
    # The precision of x itself.
    eps = float(jnp.finfo(found.m2.dtype).eps)
    rounding = abs2(found.shift * eps)
    far = abs2(found.offset) > LARGEST_SHIFT * (found.var + epsilon + rounding)
    return (far | (jnp.isinf(found.m2) & (found.offset != 0))).any()
