"""One training step and one evaluation step, sharded over the mesh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.augment import crop_and_flip, example_keys, to_float
from train.data import Batch

AXIS = "data"


class TrainState(NamedTuple):
    """All that changes from step to step, the same on every device."""

    step: jax.Array  # () steps taken
    params: Any
    batch_stats: Any
    opt_state: Any


class Sums(NamedTuple):
    """Sums over examples; they add up over batches."""

    loss: jax.Array  # () in nats
    correct: jax.Array  # ()
    count: jax.Array  # ()


class Recipe(NamedTuple):
    """What the steps do with a batch, fixed while tracing."""

    model: nn.Module  # called with (images, train=...)
    optimizer: optax.GradientTransformation
    pixel_mean: tuple[float, ...]  # (C,) in 0..255
    pixel_std: tuple[float, ...]
    padding: int  # of the random crop; 0 for none
    flip: bool
    seed: int


def make_optimizer(
    schedule: optax.Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay is added to the gradient of kernels.

    Scale and bias are not decayed. Source: He et al. (2015), section 4.2.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.sgd(schedule, momentum, nesterov=nesterov),
    )


def is_kernel(params: Any) -> Any:
    """Returns the tree of params with True at kernels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def init_state(
    recipe: Recipe, image_shape: tuple[int, ...], mesh: Mesh
) -> TrainState:
    """Returns the state at step 0 on every device of the mesh.

    A function of recipe.seed alone. Compiled as one program: operation by
    operation it takes longer than the first epoch on digits.
    """

    def init() -> TrainState:
        image = jnp.zeros((1, *image_shape))
        key = jax.random.key(recipe.seed)
        variables = recipe.model.init(key, image, train=False)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=recipe.optimizer.init(params),
        )

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))()


def make_train_step(recipe: Recipe, mesh: Mesh) -> Any:
    """Returns jit of (state, batch, epoch) -> (state, Sums).

    The batch is split over the mesh axis `data`; loss, gradient and batch
    statistics are those of the whole batch. The state is donated.
    """
    step = functools.partial(_train_step, recipe)
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(AXIS), P()),
        out_specs=P(),
        check_vma=True,
    )
    return jax.jit(sharded, donate_argnums=0)


def make_test_step(recipe: Recipe, mesh: Mesh) -> Any:
    """Returns jit of (params, batch_stats, batch) -> Sums, masked by where."""
    sharded = jax.shard_map(
        functools.partial(_test_step, recipe),
        mesh=mesh,
        in_specs=(P(), P(), P(AXIS)),
        out_specs=P(),
        check_vma=True,
    )
    return jax.jit(sharded)


def _train_step(
    recipe: Recipe, state: TrainState, batch: Batch, epoch: jax.Array
) -> tuple[TrainState, Sums]:
    images = augmented(recipe, batch, epoch)

    def loss(params: Any) -> tuple[jax.Array, tuple[Sums, Any]]:
        logits, updates = recipe.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        sums = _sums(logits, batch)
        return sums.loss / sums.count, (sums, updates.get("batch_stats", {}))

    grads, (sums, batch_stats) = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), sums


def augmented(recipe: Recipe, batch: Batch, epoch: jax.Array) -> jax.Array:
    """Returns the images (B, H, W, C) that the network sees in training.

    A function of recipe.seed, epoch and batch.index alone.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), epoch)
    return crop_and_flip(
        _inputs(recipe, batch),
        example_keys(key, batch.index),
        padding=recipe.padding,
        flip=recipe.flip,
    )


def _test_step(
    recipe: Recipe, params: Any, batch_stats: Any, batch: Batch
) -> Sums:
    logits = recipe.model.apply(
        {"params": params, "batch_stats": batch_stats},
        _inputs(recipe, batch),
        train=False,
    )
    return _sums(logits, batch)


def _inputs(recipe: Recipe, batch: Batch) -> jax.Array:
    mean, std = jnp.array(recipe.pixel_mean), jnp.array(recipe.pixel_std)
    return to_float(batch.images, mean, std)


def _sums(logits: jax.Array, batch: Batch) -> Sums:
    """Sums over the whole batch on all devices; padding counts nothing."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    correct = logits.argmax(-1) == batch.labels
    return Sums(
        *(
            jax.lax.psum(jnp.where(batch.where, values, 0).sum(), AXIS)
            for values in (loss, correct, jnp.ones_like(loss))
        )
    )
