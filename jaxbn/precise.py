"""Running statistics recomputed over a data set, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._moments import Moments

__all__ = ["Precise", "recompute", "with_statistics"]


class Precise(NamedTuple):
    """What `recompute` returns.

    Attributes:
      stats: tree of Moments in float64 numpy, over all batches.
      batches: how many were read.
      error: estimated standard error of the worst channel, relative; inf
        where it cannot be told.
      converged: whether error came below the tolerance.
    """

    stats: Any
    batches: int
    error: float
    converged: bool


def recompute(
    batch_moments: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    min_batches: int = 10,
    epsilon: float = 1e-5,
    progress: bool = False,
) -> Precise:
    """Merges the Moments of all batches, weighted by their counts.

    A moving average remembers 1 / (1 - decay) batches, from weights that have
    changed since. This takes any number of them with the weights as they are:
    after training, after weights were averaged (SWA, EMA), or for new data.
    Where one layer lies behind another, its input depends on the batches that
    the earlier one is normalized with, so take those of training.

    The error is that of a mean of independent batches: with weights w_i,
    SE^2 = k / (k - 1) sum w_i^2 (m_i - m)^2 / (sum w_i)^2, of the means in units
    of the standard deviation and of the variances relative to the variance,
    the largest of all channels and layers. Batches in an order, such as class
    by class, are not independent: shuffle them, or give no tolerance.

    Args:
      batch_moments: (variables, batch) -> tree of Moments of the layers; it is
        compiled. `jaxbn.nnx.batch_moments`, or for flax.linen
        functools.partial(jaxbn.linen.batch_moments, model, train=True).
      variables: its first argument: variables, or an nnx model.
      batches: of any sizes; on several devices, sharded arrays.
      tolerance: stops once the error is below; None reads all batches.
      min_batches: that are read before it may stop, at least 2.
      epsilon: the layers', unit of x squared; beside it a variance is nothing.
      progress: shows a bar.

    Returns:
      Precise; `with_statistics`, or `jaxbn.nnx.set_statistics`, puts its
      stats into a model.

    Raises:
      ValueError: there is no batch; batch_moments returns something else; or
        statistics are not finite, with the number of the batch.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm, section 3.
    """
    if min_batches < 2:
        raise ValueError(f"min_batches must be at least 2; got {min_batches}.")
    compiled = jax.jit(batch_moments)
    sums: list[_Sum] = []
    read, error = 0, np.inf
    treedef = None
    for batch in _shown(batches, progress):
        found, treedef = jax.tree.flatten(
            jax.device_get(compiled(variables, batch)), is_leaf=_is_moments
        )
        if not found or not all(map(_is_moments, found)):
            raise ValueError(
                "batch_moments must return a tree of jaxbn.Moments; got "
                f"{jax.tree.map(type, found)}."
            )
        sums = sums or [_Sum() for _ in found]
        for total, part in zip(sums, found):
            if not (
                np.isfinite(part.mean).all() and np.isfinite(part.m2).all()
            ):
                raise ValueError(
                    f"Statistics of batch {read} (from 0) are not finite. "
                    "Nothing was changed; look for NaN or inf in it."
                )
            total.add(part)
        read += 1
        if read > 1:
            error = max(total.error(epsilon) for total in sums)
        if tolerance is not None and read >= min_batches and error < tolerance:
            break
    if not read:
        raise ValueError(
            "There was no batch. An iterator that was read before is empty: "
            "make a new one."
        )
    stats = jax.tree.unflatten(treedef, [total.moments for total in sums])
    converged = tolerance is not None and error < tolerance
    return Precise(stats, read, float(error), converged)


def with_statistics(batch_stats: Any, stats: Any, *, ddof: int = 0) -> Any:
    """Returns batch_stats with the mean and variance of Moments.

    var = m2 / (count - ddof). Everything else in batch_stats, such as a count
    of steps, stays; so does a channel of which nothing was kept.

    Args:
      batch_stats: nested mappings, a layer's with mean and var.
      stats: the same tree, or a part of it, with Moments in place of the
        layers' mappings, as Precise.stats is for flax.linen.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
      The tree of batch_stats, in its dtypes; batch_stats itself stays.

    Raises:
      ValueError: the trees do not fit.
    """
    if _is_moments(stats):
        return _layer_with_statistics(batch_stats, stats, ddof)
    fits = isinstance(batch_stats, Mapping) and isinstance(stats, Mapping)
    if not fits or not set(stats) <= set(batch_stats):
        raise ValueError(
            f"stats has {_words(stats)}, which batch_stats has not; it has "
            f"{_words(batch_stats)}."
        )
    changed = {
        name: with_statistics(batch_stats[name], stats[name], ddof=ddof)
        for name in stats
    }
    return type(batch_stats)({**batch_stats, **changed})


def _layer_with_statistics(
    layer: Mapping[str, Any], stats: Moments, ddof: int
) -> Mapping[str, Any]:
    fits = isinstance(layer, Mapping) and {"mean", "var"} <= set(layer)
    if not fits or np.shape(layer["mean"]) != np.shape(stats.mean):
        raise ValueError(
            f"Moments with a mean of shape {np.shape(stats.mean)} do not fit "
            f"{jax.tree.map(np.shape, layer)}."
        )
    known = np.asarray(stats.count) > ddof
    var = stats.m2 / np.maximum(stats.count - ddof, 1)

    def put(name: str, value: Any) -> jax.Array:
        value = np.where(known, value, layer[name])
        return jnp.asarray(value, layer[name].dtype)

    new = {"mean": put("mean", stats.mean), "var": put("var", var)}
    mapping: Any = type(layer)
    changed: Mapping[str, Any] = mapping({**layer, **new})
    return changed


def _words(tree: Any) -> str:
    return ", ".join(map(str, tree)) if isinstance(tree, Mapping) else "none"


class _Sum:
    """Moments in float64, and how far the batches lie apart."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self._squares: Any = 0.0  # sum w^2
        self._first: dict[str, Any] = {}  # sum w^2 m
        self._second: dict[str, Any] = {}  # sum w^2 m^2
        self._origin: dict[str, Any] = {}
        self._batches = 0

    def add(self, part: Moments) -> None:
        part = _in_float64(part)
        values = {"mean": part.mean, "var": part.m2 / np.maximum(part.count, 1)}
        weight = np.square(part.count)
        if self.moments is None:
            self.moments = part
            # About the first batch, so that equal batches have no error.
            self._origin = values
            self._first = dict.fromkeys(values, 0.0)
            self._second = dict.fromkeys(values, 0.0)
        else:
            self.moments = _merge(self.moments, part)
        self._batches += 1
        self._squares = self._squares + weight
        for name, value in values.items():
            d = value - self._origin[name]
            self._first[name] = self._first[name] + weight * d
            self._second[name] = self._second[name] + weight * np.abs(d) ** 2

    def error(self, epsilon: float) -> float:
        if self.moments is None:
            return np.inf
        count, mean, m2 = self.moments
        total = np.maximum(count, 1)
        var = m2 / total + epsilon
        worst = 0.0
        for name, center, unit in (
            ("mean", mean, np.sqrt(var)),
            ("var", m2 / total, var),
        ):
            c = center - self._origin[name]
            spread = (
                self._second[name]
                - 2 * (np.conj(c) * self._first[name]).real
                + self._squares * np.abs(c) ** 2
            )
            factor = self._batches / (self._batches - 1)
            error = np.sqrt(factor * np.maximum(spread, 0)) / total / unit
            worst = max(worst, float(np.max(error, initial=0.0)))
        return worst


def _in_float64(part: Moments) -> Moments:
    """Wide, with a count of as many axes as the mean."""
    count, mean, m2 = map(np.asarray, part)
    # Layers stacked by a scan have their axis first.
    count = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    wide = np.promote_types(mean.dtype, np.float64)
    fields: Any = (
        count.astype(np.float64),
        mean.astype(wide),
        m2.astype(np.float64),
    )
    return Moments(*fields)


def _merge(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    share = b.count / np.maximum(count, 1)
    gap = b.mean - a.mean
    between = a.count * share * np.abs(gap) ** 2
    return Moments(count, a.mean + share * gap, a.m2 + b.m2 + between)


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.progress import track  # comes with flax

    return track(batches, description="statistics")
