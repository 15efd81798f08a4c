"""Loss and confusion matrix over a split."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from train import batching, data
from train.augment import to_float
from train.experiment import Experiment
from train.recipe import Recipe

_BATCH = 1000  # examples per step


class Counts(NamedTuple):
    """Sums over examples; K classes."""

    loss: Any  # (K,) in nats, summed over the examples of a class
    confusion: Any  # (K, K) examples: rows are labels, columns predictions


def make_counter(
    experiment: Experiment, split: data.Split
) -> Callable[[Any], Counts]:
    """Returns (variables) -> Counts over all examples, each once."""
    topology, classes = experiment.topology, experiment.dataset.num_classes
    step = jax.jit(
        topology.shard_map(
            functools.partial(_step, experiment.recipe, topology.axes, classes),
            (P(), P(topology.axes)),
        )
    )
    size = topology.padded(min(_BATCH, len(split.labels)))

    def count(variables: Any) -> Counts:
        loss, confusion = 0.0, 0
        for rows in batching.test_batches(
            split, size, rows=topology.rows(size)
        ):
            part = step(variables, topology.put(rows, size))
            # Blocks each step: simulated devices must not run far ahead.
            part = jax.device_get(part)
            loss = loss + np.float64(part.loss)
            confusion = confusion + np.int64(part.confusion)
        return Counts(loss, confusion)

    return count


def _step(
    recipe: Recipe,
    axes: tuple[str, ...],
    classes: int,
    variables: Any,
    batch: batching.Batch,
) -> Counts:
    logits = recipe.model.apply(
        variables,
        to_float(batch.images, recipe.pixel_mean, recipe.pixel_std),
        train=False,
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.where(batch.where, loss, 0)
    pair = batch.labels * classes + logits.argmax(-1)
    seen = jnp.where(batch.where, 1, 0)
    local = Counts(
        jax.ops.segment_sum(loss, batch.labels, classes),
        jax.ops.segment_sum(seen, pair, classes**2),
    )
    both = jax.lax.psum(local, axes)
    return both._replace(confusion=both.confusion.reshape(classes, classes))


def metrics(counts: Counts) -> dict[str, Any]:
    """Returns images, loss and accuracy, in total and by class.

    A class without images has neither loss nor accuracy.
    """
    images = counts.confusion.sum(1)
    correct = counts.confusion.diagonal()
    return {
        **_means(images.sum(), correct.sum(), counts.loss.sum()),
        "classes": list(map(_means, images, correct, counts.loss)),
        "confusion": counts.confusion.tolist(),
    }


def _means(images: Any, correct: Any, loss: Any) -> dict[str, float]:
    if not images:
        return {"images": 0}
    return {
        "images": int(images),
        "loss": float(loss / images),
        "accuracy": float(correct / images),
    }
