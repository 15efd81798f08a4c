"""Recipe and state of training, and the optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class TrainState(NamedTuple):
    """State of training, replicated on every device."""

    step: jax.Array  # () number of batches so far
    skipped: jax.Array  # () batches with a nonfinite loss or gradient
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any  # average of params, or None


class Sums(NamedTuple):
    """Sums over examples; additive over batches."""

    loss: jax.Array  # () nats
    correct: jax.Array  # ()
    count: jax.Array  # ()
    nonfinite: jax.Array  # () batches whose update was skipped


class Recipe(NamedTuple):
    """What a step computes; static while tracing."""

    model: nn.Module  # called with (images, train=...)
    optimizer: optax.GradientTransformation
    pixel_mean: tuple[float, ...]  # (C,) in units of 0..255
    pixel_std: tuple[float, ...]
    padding: int  # of the random crop; 0 disables it
    flip: bool
    seed: int
    label_smoothing: float = 0.0
    average_decay: float | None = None  # decay of the average of params
    stop_if_nonfinite: bool = True  # False: skip the batch
    microbatches: int = 1  # per device, processed in turn
    # The same network, also synchronized over microbatches; None without.
    microbatch_model: nn.Module | None = None


def make_optimizer(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Returns SGD with momentum and L2 weight decay on kernels.

    Scale and bias are not decayed. Source: He et al. (2015), section 4.2.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.sgd(schedule, momentum, nesterov=nesterov),
    )


def is_kernel(params: Any) -> Any:
    """Returns a mask of params that is True for kernels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def init_state(
    recipe: Recipe, image_shape: tuple[int, ...], mesh: Mesh
) -> TrainState:
    """Returns the state at step 0 on every device of the mesh.

    Depends only on recipe.seed. Compiled as one program: op by op it takes
    longer than the first epoch on digits.
    """

    def init() -> TrainState:
        image = jnp.zeros((1, *image_shape))
        key = jax.random.key(recipe.seed)
        variables = recipe.model.init(key, image, train=False)
        params = variables["params"]
        averaged = recipe.average_decay is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=recipe.optimizer.init(params),
            average=params if averaged else None,
        )

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))()


def abstract_state(
    recipe: Recipe, image_shape: tuple[int, ...], mesh: Mesh
) -> TrainState:
    """Returns shapes, dtypes and shardings of `init_state`, uncompiled."""
    shapes = jax.eval_shape(lambda: init_state(recipe, image_shape, mesh))
    replicated = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated),
        shapes,
    )
