"""Finds the layers that make a loss nonfinite."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import jaxbn
from train import UserError, batching
from train.experiment import Experiment
from train.layer_moments import make_layer_moments
from train.state import TrainState

MAX_LISTED = 5


def nonfinite_error(
    config: ConfigDict,
    experiment: Experiment,
    state: TrainState,
    epoch: int,
    *,
    newest: int | None,
) -> UserError:
    """Returns the error of a run that stops, with the layers' statistics.

    Args:
      config: config of the run.
      experiment: components of the run.
      state: state before the nonfinite batch.
      epoch: epoch of the batch, from 0.
      newest: step of the newest checkpoint, or None.
    """
    step = int(state.step)
    batch = step - experiment.steps.before(epoch, 0)
    text = (
        f"The loss or a gradient is not finite at step {step + 1} (epoch "
        f"{epoch + 1}, batch {batch + 1})."
    )
    if config.norm not in ("flax", "none"):
        moments = _moments_of_batch(config, experiment, state, epoch, batch)
        text += f" {_describe_layers(moments)}"
    good = "none yet" if newest is None else f"of step {newest}"
    return UserError(
        f"{text} The last good checkpoint is {good}. Lower learning_rate, now "
        f"{config.learning_rate}, raise warmup_epochs, or set "
        "on_nonfinite=skip."
    )


def _moments_of_batch(
    config: ConfigDict,
    experiment: Experiment,
    state: TrainState,
    epoch: int,
    batch: int,
) -> Any:
    """Returns the moments of each layer's input, on the host."""
    topology, size = experiment.topology, config.batch_size
    rows = next(
        batching.train_batches(
            experiment.dataset.train,
            size,
            seed=config.seed,
            epoch=epoch,
            start=batch,
            rows=topology.rows(size),
        )
    )
    read = jax.jit(
        make_layer_moments(experiment, seed=config.seed, epoch=epoch)
    )
    return jax.device_get(read(state.variables, topology.put(rows, size)))


def _describe_layers(tree: Any) -> str:
    layers = {
        "/".join(key.key for key in path): moments
        for path, moments in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, jaxbn.Moments)
        )
    }
    bad = [name for name, m in layers.items() if not jaxbn.is_finite(m)]
    if bad:
        more = (
            f" and {len(bad) - MAX_LISTED} more"
            if len(bad) > MAX_LISTED
            else ""
        )
        return (
            f"Layers with nonfinite input: {', '.join(bad[:MAX_LISTED])}{more}."
        )
    size = {name: float(np.sqrt(m.var.max())) for name, m in layers.items()}
    largest = sorted(size, key=size.get, reverse=True)[:MAX_LISTED]
    listed = ", ".join(f"{name} {size[name]:.3g}" for name in largest)
    return (
        "The inputs of all layers are finite; the largest standard deviations "
        f"are {listed}."
    )
