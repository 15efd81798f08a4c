"""Training and test steps, sharded over the mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxbn import accumulate
from train.augment import crop_and_flip, example_keys, to_float
from train.batching import Batch
from train.state import Recipe, Sums, TrainState
from train.topology import MICROBATCH_AXIS


def make_train_step(recipe: Recipe, mesh: Mesh, *, steps: int = 1) -> Any:
    """Returns a jitted function (state, batch, epoch) -> (state, Sums).

    The batch is sharded over all axes of the mesh; loss, gradient and running
    statistics are those of the global batch. The state is donated.

    Args:
      recipe: what a step computes.
      mesh: mesh of the batch.
      steps: above 1, the batch has a leading axis of that many batches, which
        one program scans over; Sums are over all of them.
    """
    axes = tuple(mesh.axis_names)
    one = functools.partial(_train_step, recipe, axes)
    sharded = jax.shard_map(
        one if steps == 1 else functools.partial(_train_steps, one),
        mesh=mesh,
        in_specs=(P(), P(axes) if steps == 1 else P(None, axes), P()),
        out_specs=P(),
        check_vma=True,
    )
    return jax.jit(sharded, donate_argnums=0)


def make_test_step(recipe: Recipe, mesh: Mesh) -> Any:
    """Returns a jitted function (params, batch_stats, batch) -> Sums."""
    axes = tuple(mesh.axis_names)
    sharded = jax.shard_map(
        functools.partial(_test_step, recipe, axes),
        mesh=mesh,
        in_specs=(P(), P(), P(axes)),
        out_specs=P(),
        check_vma=True,
    )
    return jax.jit(sharded)


def augmented_images(
    recipe: Recipe, batch: Batch, epoch: jax.Array
) -> jax.Array:
    """Returns the augmented and normalized images (B, H, W, C).

    Depends only on recipe.seed, epoch and batch.index.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), epoch)
    return crop_and_flip(
        to_float(batch.images, recipe.pixel_mean, recipe.pixel_std),
        example_keys(key, batch.index),
        padding=recipe.padding,
        flip=recipe.flip,
    )


def _train_steps(
    one: Any, state: TrainState, batches: Batch, epoch: jax.Array
) -> tuple[TrainState, Sums]:
    def body(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        return one(state, batch, epoch)

    state, sums = jax.lax.scan(body, state, batches)
    return state, jax.tree.map(lambda each: each.sum(0), sums)


def _train_step(
    recipe: Recipe,
    axes: tuple[str, ...],
    state: TrainState,
    batch: Batch,
    epoch: jax.Array,
) -> tuple[TrainState, Sums]:
    several = recipe.microbatches > 1
    model = recipe.microbatch_model if several else recipe.model
    names = (*axes, MICROBATCH_AXIS) if several else axes

    def loss(
        params: Any, batch_stats: Any, epoch: jax.Array, batch: Batch
    ) -> tuple[jax.Array, tuple[Sums, Any]]:
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            augmented_images(recipe, batch, epoch),
            train=True,
            mutable=["batch_stats"],
        )
        sums = _sums(logits, batch, names, recipe.label_smoothing)
        return sums.loss / sums.count, (sums, updates.get("batch_stats", {}))

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if several:
        value_and_grad = accumulate.value_and_grad(
            loss,
            microbatches=recipe.microbatches,
            axis_name=MICROBATCH_AXIS,
            has_aux=True,
        )
    (_, (sums, batch_stats)), grads = value_and_grad(
        state.params, state.batch_stats, epoch, batch
    )
    updates, opt_state = recipe.optimizer.update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        decay = recipe.average_decay
        average = optax.incremental_update(params, average, 1 - decay)
    new = TrainState(
        state.step + 1, state.skipped, params, batch_stats, opt_state, average
    )
    return _skip_if_nonfinite(recipe, state, new, sums, grads)


def _skip_if_nonfinite(
    recipe: Recipe, old: TrainState, new: TrainState, sums: Sums, grads: Any
) -> tuple[TrainState, Sums]:
    """Returns the new state, or the old one if loss or gradient is nonfinite.

    The host checks the sums some steps later. If the run is to stop, the state
    is frozen until then. Otherwise the skipped batch still counts as a step,
    also in the schedule, so that the run ends as planned.
    """
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(optax.tree.norm(grads))
    halted = recipe.stop_if_nonfinite & (old.skipped > 0)
    take = finite & ~halted
    state = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)
    nonfinite = jnp.where(finite, 0, 1)
    step = jnp.where(halted, old.step, old.step + 1)
    if recipe.stop_if_nonfinite:
        step = jnp.where(take, step, old.step)
    opt_state = state.opt_state
    if not recipe.stop_if_nonfinite:
        opt_state = _set_schedule_count(opt_state, step)
    state = state._replace(
        step=step, skipped=old.skipped + nonfinite, opt_state=opt_state
    )
    kept = jax.tree.map(lambda a: jnp.where(take, a, 0), sums)
    return state, kept._replace(nonfinite=nonfinite)


def _set_schedule_count(opt_state: Any, step: jax.Array) -> Any:
    """Sets the step count of the optimizer's schedules."""

    def counts(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=step) if counts(node) else node,
        opt_state,
        is_leaf=counts,
    )


def _test_step(
    recipe: Recipe,
    axes: tuple[str, ...],
    params: Any,
    batch_stats: Any,
    batch: Batch,
) -> Sums:
    logits = recipe.model.apply(
        {"params": params, "batch_stats": batch_stats},
        to_float(batch.images, recipe.pixel_mean, recipe.pixel_std),
        train=False,
    )
    return _sums(logits, batch, axes, 0.0)


def _sums(
    logits: jax.Array, batch: Batch, axes: tuple[str, ...], smoothing: float
) -> Sums:
    """Returns sums over the global batch, excluding padding."""
    labels = jax.nn.one_hot(batch.labels, logits.shape[-1])
    loss = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(labels, smoothing)
    )
    correct = logits.argmax(-1) == batch.labels
    totals = (
        jax.lax.psum(jnp.where(batch.where, values, 0).sum(), axes)
        for values in (loss, correct, jnp.ones_like(loss))
    )
    return Sums(*totals, nonfinite=jnp.zeros((), jnp.int32))
