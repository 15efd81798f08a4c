"""A training step and a test step on the shard of a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxbn import accumulate
from train.augment import Draws, crop_and_flip, cutout, draw, to_float
from train.batching import Batch
from train.recipe import Recipe
from train.state import Sums, TrainState, network_variables
from train.topology import MICROBATCH_AXIS
from train.views import mean_logits, view_logits


def train_step(
    recipe: Recipe,
    axes: tuple[str, ...],
    phase: int,
    state: TrainState,
    source: jax.Array | None,
    batch: Batch,
    draws: Draws,
) -> tuple[TrainState, Sums]:
    """Takes a step; loss, gradient and statistics are of the global batch.

    Args:
      recipe: what a step computes.
      axes: mesh axes of the batch, over which this is mapped.
      phase: see `Recipe.training_model`.
      state: state before the step.
      source: all training images, of which batch.index are rows; None if
        batch.images holds those of the batch.
      batch: shard of the batch.
      draws: random numbers of its augmentation.

    Returns:
      (new state, Sums over the global batch).
    """
    several = recipe.microbatches > 1
    model = recipe.training_model(phase)
    names = (*axes, MICROBATCH_AXIS) if several else axes

    def loss(
        params: Any,
        batch_stats: Any,
        frozen: Any,
        source: jax.Array | None,
        examples: tuple[Batch, Draws],
    ) -> tuple[jax.Array, tuple[Sums, Any]]:
        batch, draws = examples
        logits, updates = model.apply(
            network_variables(params, batch_stats, frozen),
            augment(recipe, source, batch, draws),
            train=True,
            mutable=["batch_stats"],
        )
        sums = _sums(logits, batch, names, recipe.label_smoothing)
        scaled = sums.loss / sums.count * recipe.loss_scale
        return scaled, (sums, updates.get("batch_stats", {}))

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if several:
        value_and_grad = accumulate.value_and_grad(
            loss,
            microbatches=recipe.microbatches,
            axis_name=MICROBATCH_AXIS,
            has_aux=True,
        )
    (_, (sums, batch_stats)), grads = value_and_grad(
        state.params, state.batch_stats, state.frozen, source, (batch, draws)
    )
    if recipe.loss_scale != 1:
        grads = jax.tree.map(lambda g: g / recipe.loss_scale, grads)
    updates, opt_state = recipe.optimizer.update(
        grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        decay = recipe.average_decay
        average = optax.incremental_update(params, average, 1 - decay)
    new = state._replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        average=average,
    )
    if recipe.on_nonfinite != "ignore":
        new, sums = _skip_if_nonfinite(recipe, state, new, sums, grads)
    if recipe.lookahead is not None:
        new = _look_ahead(recipe, state, new)
    return new, sums


def test_step(
    recipe: Recipe,
    axes: tuple[str, ...],
    variables: dict[str, Any],
    source: jax.Array | None,
    batch: Batch,
) -> Sums:
    """Returns sums over the global batch, excluding padding.

    Args:
      recipe, axes, source, batch: see `train_step`.
      variables: variables of the network.
    """
    if not recipe.test_time_augmentation:
        pixels = batch.images if source is None else source[batch.index]
        floats = to_float(pixels, recipe.pixel_mean, recipe.pixel_std)
        logits = recipe.model.apply(variables, floats, train=False)
        return _sums(logits, batch, axes, 0.0)
    views = view_logits(recipe, variables, *_pixels(source, batch))
    correct = _sums(mean_logits(views), batch, axes, 0.0).correct
    return _sums(views[0, 0], batch, axes, 0.0)._replace(augmented=correct)


test_step.__test__ = False  # for pytest, where it is imported by name


def augmented_images(
    recipe: Recipe, batch: Batch, *, seed: Any, epoch: Any
) -> jax.Array:
    """Returns the augmented and normalized images (B, H, W, C).

    Depends only on seed, epoch and batch.index.
    """
    draws = draw(
        recipe.augmentation,
        batch.index,
        batch.images.shape[1:],
        seed=seed,
        epoch=epoch,
    )
    return augment(recipe, None, batch, draws)


def augment(
    recipe: Recipe, source: jax.Array | None, batch: Batch, draws: Draws
) -> jax.Array:
    """Returns the augmented and normalized images of a batch."""
    images, rows = _pixels(source, batch)
    floats = crop_and_flip(
        images,
        rows,
        draws.offset,
        draws.flip,
        pad_mode=recipe.augmentation.pad_mode,
        mean=recipe.pixel_mean,
        std=recipe.pixel_std,
    )
    return cutout(floats, draws.corner, recipe.augmentation.cutout)


def _pixels(
    source: jax.Array | None, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns images, and the rows of them that are in the batch."""
    if source is None:
        return batch.images, jnp.arange(len(batch.images))
    return source, batch.index


def _look_ahead(recipe: Recipe, old: TrainState, new: TrainState) -> TrainState:
    """Applies lookahead to the new state, also after a skipped batch."""
    fast = new.params, new.batch_stats
    (params, batch_stats), slow = recipe.lookahead.update(
        fast, new.slow, new.step
    )
    changed = new._replace(params=params, batch_stats=batch_stats, slow=slow)
    if recipe.on_nonfinite != "stop":
        return changed
    halted = new.step == old.step
    return jax.tree.map(lambda a, b: jnp.where(halted, a, b), new, changed)


def _skip_if_nonfinite(
    recipe: Recipe, old: TrainState, new: TrainState, sums: Sums, grads: Any
) -> tuple[TrainState, Sums]:
    """Returns the new state, or the old one if loss or gradient is nonfinite.

    The host checks the sums some steps later. If the run is to stop, the state
    is frozen until then. Otherwise the skipped batch still counts as a step,
    also in the schedule, so that the run ends as planned.
    """
    stop = recipe.on_nonfinite == "stop"
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(optax.tree.norm(grads))
    halted = stop & (old.skipped > 0)
    take = finite & ~halted
    state = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)
    nonfinite = jnp.where(finite, 0, 1)
    step = jnp.where(halted, old.step, old.step + 1)
    if stop:
        step = jnp.where(take, step, old.step)
    opt_state = state.opt_state
    if not stop:
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
    zero = jnp.zeros((), jnp.int32)
    return Sums(*totals, nonfinite=zero, augmented=zero)
