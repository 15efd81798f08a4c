"""Running statistics against those of the data, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._checks import describe
from jaxbn._passes import Moments
from jaxbn._running import RunningStats
from jaxbn.diagnostics._model import Apply, checked_logits, map_rows


class Staleness(NamedTuple):
    """Distance of a layer's running statistics from those of the data.

    Attributes:
      z: (C,) |mean_running - mean| in standard deviations.
      log_variance: (C,) log(var_running / var).
      kl: (C,) KL(data || running) of normal distributions, nats.
    """

    z: jax.Array
    log_variance: jax.Array
    kl: jax.Array


class Evaluation(NamedTuple):
    """Means over examples.

    Attributes:
      loss: () cross entropy in nats.
      accuracy: () share.
    """

    loss: jax.Array
    accuracy: jax.Array


class EvalGap(NamedTuple):
    """One model on two sets of data and three kinds of statistics.

    Attributes:
      train_batch: training data, statistics of each batch.
      test_batch: test data, statistics of each batch.
      test_running: test data, the model's running statistics.
      test_precise: test data, precise statistics; None where none are given.
    """

    train_batch: Evaluation
    test_batch: Evaluation
    test_running: Evaluation
    test_precise: Evaluation | None


def stats_staleness(
    running: Any, precise: Any, *, epsilon: float = 1e-5
) -> Any:
    """Compares running statistics with those of the data, layer by layer.

    With v = var + epsilon of the data and v_r of the running statistics:
    z = |mean_r - mean| / sqrt(v), log_variance = log(v_r / v) and
    kl = (log(v_r / v) + (v + |mean_r - mean|^2) / v_r - 1) / 2.

    An average with decay d remembers about 1 / (1 - d) steps: after fewer, its
    start of mean 0 and variance 1 is what is measured here.

    Args:
      running: batch_stats, nested mappings, a layer's with mean and var; or
        with RunningStats for layers.
      precise: the same tree, or a part of it, with Moments in place of the
        layers, as `jaxbn.precise.recompute(...).stats` is for flax.linen.
      epsilon: the layers', unit of x squared; may be 0.

    Returns:
      The tree of precise with Staleness for layers. NaN in channels of which
      nothing was kept.

    Raises:
      ValueError: the trees do not fit.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm, section 3,
    on the difference; the measures are those of `jaxbn.doctor`.
    """
    if isinstance(precise, Moments):
        return _staleness(running, precise, epsilon)
    if isinstance(running, RunningStats):
        running = running._asdict()
    fits = isinstance(running, Mapping) and isinstance(precise, Mapping)
    if not fits or not set(precise) <= set(running):
        raise ValueError(
            f"precise has {_list_keys(precise)}, which running has not; it has "
            f"{_list_keys(running)}. Layers are jaxbn.Moments in precise."
        )
    return {
        name: stats_staleness(running[name], node, epsilon=epsilon)
        for name, node in precise.items()
    }


def _staleness(layer: Any, data: Moments, epsilon: float) -> Staleness:
    if isinstance(layer, RunningStats):
        layer = layer._asdict()
    if not isinstance(layer, Mapping) or not {"mean", "var"} <= set(layer):
        raise ValueError(
            "a layer of running must have mean and var where precise has "
            f"Moments; it has {_list_keys(layer)}."
        )
    count, mean, m2 = map(jnp.asarray, data)
    if jnp.shape(layer["mean"]) != mean.shape:
        raise ValueError(
            f"mean is {describe(jnp.asarray(layer['mean']))} in running and "
            f"{describe(mean)} in precise."
        )
    # Layers stacked by a scan have their axis first.
    count = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    count = jnp.where(count > 0, count, jnp.nan)
    v = m2 / count + epsilon
    v_running = widen(jnp.asarray(layer["var"])) + epsilon
    gap = jnp.abs(layer["mean"] - mean)
    log_variance = jnp.log(v_running / v)
    kl = (log_variance + (v + jnp.square(gap)) / v_running - 1) / 2
    return Staleness(gap / jnp.sqrt(v), log_variance, kl)


def eval_gap(
    apply: Apply,
    params: Any,
    batch_stats: Any,
    train: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array],
    *,
    batch_size: int,
    precise_stats: Any = None,
    unroll: bool = False,
) -> EvalGap:
    """Measures one model with statistics of batches and of the population.

    Between train_batch and test_batch lies generalization, with the same kind
    of statistics on both sides. Between test_batch and test_precise lies the
    change from batches to the population alone, and between test_precise and
    test_running what the moving average got wrong.

    Args:
      apply: (params, batch_stats, x, train=...) -> logits (B, C).
      params: passed on.
      batch_stats: running statistics.
      train: (x (N, ...), labels (N,) integers) of training.
      test: the same of the test set.
      batch_size: of every batch, consecutive examples; it is the size of
        training's for numbers that mean something, and divides both N.
      precise_stats: a tree as batch_stats, of
        `jaxbn.precise.with_statistics`; None leaves test_precise None.
      unroll: as in `gradient_line`, with a copy of the network for each batch.

    Returns:
      EvalGap.

    Raises:
      ValueError: labels do not fit x, batch_size does not divide, or apply
        returns something else.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm.
    """
    sets = {
        name: _batches(name, *data, batch_size)
        for name, data in (("train", train), ("test", test))
    }

    def evaluate(data: str, stats: Any, by_batch: bool) -> Evaluation:
        def one(batch: tuple[jax.Array, jax.Array]) -> Evaluation:
            x, labels = batch
            z = widen(checked_logits(apply, params, stats, x, train=by_batch))
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(z), labels[:, None], 1
            )
            right = z.argmax(1) == labels
            return Evaluation(-chosen.mean(), right.mean(dtype=z.dtype))

        found = map_rows(one, sets[data], unroll=unroll)
        means: Evaluation = jax.tree.map(jnp.mean, found)
        return means

    precise = None
    if precise_stats is not None:
        precise = evaluate("test", precise_stats, False)
    return EvalGap(
        evaluate("train", batch_stats, True),
        evaluate("test", batch_stats, True),
        evaluate("test", batch_stats, False),
        precise,
    )


def _batches(
    name: str, x: jax.Array, labels: jax.Array, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != x.shape[:1] or not integers:
        raise ValueError(
            f"{name} must be (x (N, ...), labels (N,) integers); got "
            f"{describe(x)} and {describe(labels)}."
        )
    if batch_size < 1 or not len(x) or len(x) % batch_size:
        raise ValueError(
            f"batch_size must divide the {len(x)} examples of {name}, so that "
            f"batches are alike; got {batch_size}."
        )
    shape = (-1, batch_size)
    return x.reshape(*shape, *x.shape[1:]), labels.reshape(shape)


def _list_keys(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return ", ".join(map(str, tree)) or "nothing"
    return type(tree).__name__
