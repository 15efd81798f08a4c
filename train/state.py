"""The state of training, and the sums that a step returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.augment import to_float
from train.recipe import Recipe
from train.topology import Topology


class TrainState(NamedTuple):
    """State of training, replicated on every device."""

    step: jax.Array  # () number of batches so far
    skipped: jax.Array  # () batches with a nonfinite loss or gradient
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any  # average of params, or None
    slow: Any  # (params, batch_stats), slow weights of lookahead, or None
    frozen: Any  # variables that are not trained; {} without

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the network."""
        return network_variables(self.params, self.batch_stats, self.frozen)


def network_variables(
    params: Any, batch_stats: Any, frozen: Any
) -> dict[str, Any]:
    """Returns the variables that the network is applied to."""
    variables = {"params": params, "batch_stats": batch_stats}
    return variables | ({"frozen": frozen} if frozen else {})


class Sums(NamedTuple):
    """Sums over examples; additive over batches."""

    loss: jax.Array  # () nats
    correct: jax.Array  # ()
    count: jax.Array  # ()
    nonfinite: jax.Array  # () batches whose update was skipped
    augmented: jax.Array  # () correct with test-time augmentation, else 0


NO_SUMS = (0.0,) * len(Sums._fields)  # of no batches


def make_state(
    recipe: Recipe, images: jax.Array, seed: int | jax.Array
) -> TrainState:
    """Returns the state at step 0.

    Args:
      recipe: recipe of the run.
      images: (init_images, H, W, C) uint8, the first training images.
      seed: seed of the run.
    """
    images = to_float(images, recipe.pixel_mean, recipe.pixel_std)
    key = jax.random.key(seed)
    variables = recipe.model.init(key, images, train=False)
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=recipe.optimizer.init(params),
        average=None if recipe.average_decay is None else params,
        slow=None if recipe.lookahead is None else (params, batch_stats),
        frozen=variables.get("frozen", {}),
    )


def abstract_state(
    recipe: Recipe, image_shape: tuple[int, ...], topology: Topology
) -> TrainState:
    """Returns shapes, dtypes and shardings of a state, uncompiled."""
    images = jax.ShapeDtypeStruct((recipe.init_images, *image_shape), np.uint8)
    shapes = jax.eval_shape(
        lambda images: make_state(recipe, images, 0), images
    )
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=topology.replicated
        ),
        shapes,
    )
