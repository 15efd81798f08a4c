"""Training and test steps, sharded over the mesh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import accumulate
from train.augment import crop_and_flip, example_keys, to_float
from train.data import Batch
from train.topology import MICROBATCH_AXIS


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
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        shapes,
    )


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
