"""Statistics of activations, and tails of gradients, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._checks import check_input, split_axes
from jaxbn._moments import moments
from jaxbn.diagnostics._trees import Path, find_leaf, leaf_names


class ActivationStats(NamedTuple):
    """One value per layer, in the given order.

    Attributes:
      mean_abs: (L,) absolute mean of a channel, averaged over channels.
      std: (L,) standard deviation of a channel, averaged over channels.
      dead: (L,) fraction of channels without positive values.
      saturated: (L,) fraction of values above the limit in magnitude, or None.
    """

    mean_abs: jax.Array
    std: jax.Array
    dead: jax.Array
    saturated: jax.Array | None


class GradientTail(NamedTuple):
    """Distribution of the entries of a gradient.

    Attributes:
      absmax: () largest magnitude.
      std: () standard deviation.
      excess_kurtosis: () 0 for a normal distribution.
      hill: () tail index; smaller is heavier.
    """

    absmax: jax.Array
    std: jax.Array
    excess_kurtosis: jax.Array
    hill: jax.Array


def activation_stats(
    activations: Any,
    *,
    order: Sequence[Path] | None = None,
    limit: float | None = None,
    feature_axis: int = -1,
) -> ActivationStats:
    """Summarizes the activations of each layer for a batch.

    Mean and standard deviation are computed per channel and then averaged over
    channels. Without batch norm they may explode or vanish with depth.

    Args:
      activations: tree of arrays (B, ..., C), such as a mapping of names, or
        the intermediates of flax's capture_intermediates.
      order: the layers to report, first to last: keys or paths as in
        `internal_covariate_shift`, each of one array: "Dense_0" for flax's
        Dense_0/__call__/0. None reports every array, in the order of
        `jax.tree.leaves`, which sorts keys.
      limit: magnitude above which a value is saturated, such as 0.95 for tanh;
        None does not count.
      feature_axis: axis of the channels.

    Returns:
      ActivationStats; saturated is None where limit is.

    Raises:
      ValueError: there is no array, a path in order matches none or several
        arrays, an array is not floating or has only the channel axis, or limit
        is not positive.

    Source: Bjorck et al. (2018), Understanding Batch Normalization, for
    means and deviations; Glorot and Bengio (2010), Understanding the
    Difficulty of Training Deep Feedforward Neural Networks, for saturation.
    """
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive; got {limit}.")
    leaves = jax.tree.leaves(activations)
    chosen: Sequence[int]
    if order is None:
        chosen = range(len(leaves))
    else:
        chosen = [find_leaf(activations, p, what="activations") for p in order]
    if not len(chosen):
        raise ValueError("activations has no arrays.")
    known = leaf_names(activations)
    found = []
    for index in chosen:
        try:
            found.append(_summary(leaves[index], limit, feature_axis))
        except ValueError as error:
            raise ValueError(f"{known[index]}: {error}") from error
    mean_abs, std, dead, saturated = zip(*found)
    return ActivationStats(
        jnp.stack(mean_abs),
        jnp.stack(std),
        jnp.stack(dead),
        None if limit is None else jnp.stack(saturated),
    )


def _summary(
    x: jax.Array, limit: float | None, feature_axis: int
) -> tuple[jax.Array | None, ...]:
    split_axes(check_input(x), feature_axis, needs_batch=True)
    _, mean, m2 = found = moments(x, feature_axis=feature_axis)
    x = jnp.moveaxis(widen(jnp.asarray(x)), feature_axis, -1)
    alive = (x > 0).any(tuple(range(x.ndim - 1)))
    return (
        jnp.abs(mean).mean(),
        jnp.sqrt(found.var).mean(),
        1 - alive.mean(dtype=m2.dtype),
        None if limit is None else (jnp.abs(x) > limit).mean(dtype=m2.dtype),
    )


def gradient_tail(gradient: Any, *, tail: float = 0.05) -> GradientTail:
    """Measures how heavy-tailed the entries of a gradient are.

    excess_kurtosis = m4 / m2^2 - 3 with the central moments m2 and m4. With
    sorted magnitudes x_1 >= x_2 >= ..., and k the fraction `tail` of the
    nonzero ones, hill = 1 / mean_{i <= k} log(x_i / x_{k+1}), the Hill
    estimator of alpha in P(|g| > x) ~ x^-alpha: 1 for a Cauchy distribution.
    For a normal distribution, which has no such alpha, it is about 6 at
    tail=0.05, and larger for a smaller tail.

    Args:
      gradient: a floating array, or a tree of them, treated as one vector; for
        one value per layer, map over the layers.
      tail: fraction of the entries that form the tail, 0 < tail < 1.

    Returns:
      GradientTail; hill is NaN with fewer than two nonzero entries.

    Raises:
      ValueError: gradient is empty, or tail is out of range.

    Source: Bjorck et al. (2018), Understanding Batch Normalization; Hill
    (1975), A Simple General Approach to Inference About the Tail of a
    Distribution.
    """
    if not 0 < tail < 1:
        raise ValueError(
            f"tail must be a fraction between 0 and 1; got {tail}."
        )
    leaves = [widen(jnp.ravel(leaf)) for leaf in jax.tree.leaves(gradient)]
    if not sum(leaf.size for leaf in leaves):
        raise ValueError("gradient is empty.")
    g = jnp.concatenate(leaves)
    absmax = jnp.abs(g).max()
    # Normalized by the maximum: fourth powers of small floats underflow.
    g = g / jnp.where(absmax > 0, absmax, 1)
    d = g - g.mean()
    m2, m4 = jnp.square(d).mean(), jnp.square(jnp.square(d)).mean()
    return GradientTail(
        absmax, absmax * jnp.sqrt(m2), m4 / jnp.square(m2) - 3, _hill(g, tail)
    )


def _hill(g: jax.Array, tail: float) -> jax.Array:
    most = min(max(int(tail * g.size), 1) + 1, g.size)
    x = jax.lax.top_k(jnp.abs(g), most)[0]
    nonzero = jnp.count_nonzero(g)
    k = jnp.maximum((tail * nonzero).astype(int), 1)
    k = jnp.minimum(k, most - 1)
    logs = jnp.log(jnp.where(x > 0, x, 1))
    above = jnp.where(jnp.arange(most) < k, logs - logs[k], 0)
    return jnp.where(nonzero > 1, k / above.sum(), jnp.nan)
