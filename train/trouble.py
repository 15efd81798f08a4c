"""Which layers a loss that is not finite comes from."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import jaxbn
import jaxbn.linen
from train import data
from train.prepared import Prepared
from train.step import Recipe, TrainState, augmented

SHOWN = 5


def explain(
    config: ConfigDict, prepared: Prepared, state: TrainState, epoch: int
) -> str:
    """Says at which step, and what the layers' statistics were there.

    Args:
      config: of the run.
      prepared: of the run.
      state: as it was before the batch; no later one has moved it.
      epoch: that the batch is of, from 0.
    """
    place, dataset, steps, _, recipe = prepared
    step = int(state.step)
    number = step - epoch * steps
    text = (
        f"The loss or a gradient is not finite at step {step + 1} (epoch "
        f"{epoch + 1}, batch {number + 1})."
    )
    if config.norm in ("flax", "none"):
        return text
    size = config.batch_size
    rows = next(
        data.train_batches(
            dataset.train,
            size,
            seed=config.seed,
            epoch=epoch,
            start=number,
            rows=place.rows(size),
        )
    )
    read = jax.jit(
        jax.shard_map(
            functools.partial(_moments, recipe),
            mesh=place.mesh,
            in_specs=(P(), P(), P(place.axes), P()),
            out_specs=P(),
        )
    )
    tree = read(state.params, state.batch_stats, place.put(rows, size), epoch)
    return f"{text} {_words(jax.device_get(tree))}"


def _moments(
    recipe: Recipe, params: Any, batch_stats: Any, batch: Any, epoch: jax.Array
) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    images = augmented(recipe, batch, epoch)
    return jaxbn.linen.batch_moments(
        recipe.model, variables, images, train=True
    )


def _words(tree: Any) -> str:
    layers = {
        "/".join(key.key for key in path): moments
        for path, moments in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, jaxbn.Moments)
        )
    }
    bad = [name for name, m in layers.items() if not jaxbn.is_finite(m)]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        return f"Not finite are the inputs of {', '.join(bad[:SHOWN])}{more}."
    size = {name: float(np.sqrt(m.var.max())) for name, m in layers.items()}
    largest = sorted(size, key=size.get, reverse=True)[:SHOWN]
    listed = ", ".join(f"{name} {size[name]:.3g}" for name in largest)
    return (
        "The inputs of all layers are finite; the largest standard deviations "
        f"are {listed}."
    )
