"""Staleness of running statistics, and its effect on accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn._batch_stats import map_layers
from jaxbn._checks import describe
from jaxbn._passes import Moments
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
    """Averages over examples.

    Attributes:
      loss: () cross entropy in nats.
      accuracy: () fraction of correct predictions.
    """

    loss: jax.Array
    accuracy: jax.Array


class EvalGap(NamedTuple):
    """Evaluations on two data sets, with three kinds of statistics.

    Attributes:
      train_batch: training data, batch statistics.
      test_batch: test data, batch statistics.
      test_running: test data, running statistics.
      test_precise: test data, precise statistics, or None.
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

    A moving average with decay d covers about 1 / (1 - d) steps; after fewer,
    it is dominated by the initial mean 0 and variance 1.

    Args:
      running: batch_stats, nested mappings with mean and var for each layer, or
        RunningStats in their place.
      precise: a tree of the same structure, or a part of it, with Moments for
        each layer, such as `jaxbn.precise.recompute(...).stats` for flax.linen.
      epsilon: epsilon of the layers, unit of x squared; may be 0.

    Returns:
      A tree like precise with Staleness for each layer; NaN for channels
      without any values.

    Raises:
      ValueError: the structures or the shapes do not match.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm, section 3,
    on the difference; the measures are those of `jaxbn.doctor`.
    """

    def staleness(layer: Mapping[str, Any], data: Moments) -> Staleness:
        return _staleness(layer, data, epsilon)

    return map_layers(staleness, running, precise, names=("running", "precise"))


def _staleness(
    layer: Mapping[str, Any], data: Moments, epsilon: float
) -> Staleness:
    count, mean, m2 = map(jnp.asarray, data)
    # A layer in a scan has the scanned axis first.
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
    """Evaluates a model with batch statistics and population statistics.

    The difference of train_batch and test_batch is the generalization gap, with
    batch statistics for both. The difference of test_batch and test_precise is
    the effect of population statistics, and that of test_precise and
    test_running the error of the moving average.

    Args:
      apply: (params, batch_stats, x, train=...) -> logits (B, C).
      params: passed to apply.
      batch_stats: running statistics.
      train: training set, (x (N, ...), labels (N,) integers).
      test: test set, likewise.
      batch_size: size of batches of consecutive examples; should be the
        training batch size, and must divide both N.
      precise_stats: a tree like batch_stats, from
        `jaxbn.precise.with_statistics`; None skips test_precise.
      unroll: unrolls the loop over batches, see `gradient_line`.

    Returns:
      EvalGap.

    Raises:
      ValueError: labels do not match x, batch_size does not divide N, or apply
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
            f"batch_size must divide the {len(x)} examples of {name}; got "
            f"{batch_size}."
        )
    shape = (-1, batch_size)
    return x.reshape(*shape, *x.shape[1:]), labels.reshape(shape)
