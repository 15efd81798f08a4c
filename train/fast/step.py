"""State, training step and test step of a fast run.

If the recipe has an axis, they run under `shard_map` over it: every device
holds all images and processes its shard of a batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.augment import to_float
from train.data import Split
from train.fast import augment
from train.fast.network import FROZEN
from train.fast.optimizer import lookahead
from train.fast.recipe import Recipe
from train.fast.whitening import whitening_kernel

# Offsets and weights of the views in test-time augmentation.
VIEWS = (((0, 0), 0.5), ((-1, -1), 0.25), ((1, 1), 0.25))


class State(NamedTuple):
    """State of training, replicated on every device."""

    step: jax.Array  # () number of batches so far
    params: Any
    batch_stats: Any
    opt_state: Any
    slow: Any  # (params, batch_stats), slow weights of lookahead
    frozen: Any  # filters of the first layer, not trained


class EpochPlan(NamedTuple):
    """The examples and augmentation of an epoch.

    Fields are (steps, B, ...), or (B, ...) for a single batch.
    """

    index: jax.Array  # int32, indices into the training split
    augmentation: augment.Augmentation


class Correct(NamedTuple):
    """Number of correctly classified images."""

    single_view: jax.Array  # () without augmentation
    multi_view: jax.Array  # () with the mean over all views


def init_state(recipe: Recipe, train: Split, seed: jax.Array) -> State:
    """Returns the initial state; computes the first layer from the data."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    images = to_float(
        train.images[: recipe.whitening_images],
        recipe.pixel_mean,
        recipe.pixel_std,
    )
    model = recipe.model
    variables = model.init(key, images[:1], train=False)
    kernel = whitening_kernel(images, epsilon=recipe.whitening_epsilon)
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=recipe.optimizer.init(params),
        slow=(params, batch_stats),
        frozen={"whitening": {"kernel": kernel}},
    )


def plan_epoch(
    recipe: Recipe, train: Split, seed: jax.Array, epoch: Any
) -> EpochPlan:
    """Returns all full batches of an epoch, a function of seed and epoch."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    for_order, for_augmentation = jax.random.split(key)
    examples = len(train.labels)
    steps, size = recipe.steps_per_epoch, recipe.batch_size
    order = jax.random.permutation(
        jax.random.fold_in(for_order, epoch), examples
    )
    index = order[: steps * size].astype(jnp.int32)
    height, width = train.images.shape[1:3]
    augmentation = augment.draw(
        for_augmentation,
        index,
        epoch,
        flip=recipe.flip,
        translate=recipe.translate,
        last_corner=(height - recipe.cutout, width - recipe.cutout),
    )
    whole = EpochPlan(index, augmentation)
    return jax.tree.map(lambda a: a.reshape(steps, size, *a.shape[1:]), whole)


def augmented_images(
    recipe: Recipe, train: Split, batch: EpochPlan
) -> jax.Array:
    """Returns the augmented and normalized images (B, H, W, C)."""
    flip, offset, corner = batch.augmentation
    images = augment.flip_and_translate(train.images, batch.index, flip, offset)
    images = to_float(images, recipe.pixel_mean, recipe.pixel_std)
    return augment.cutout(images, corner, recipe.cutout)


def train_step(
    recipe: Recipe,
    state: State,
    train: Split,
    batch: EpochPlan,
    *,
    train_bias: bool,
) -> tuple[State, jax.Array]:
    """Takes a training step; returns the new state and mean loss in nats.

    Args:
      recipe: what a step computes.
      state: state before the step.
      train: all training images.
      batch: global batch.
      train_bias: whether the whitening bias is trained. False saves the
        gradient with respect to the input of the first block.
    """
    batch = jax.tree.map(functools.partial(_local_shard, recipe), batch)
    labels = jax.nn.one_hot(train.labels[batch.index], recipe.model.num_classes)
    targets = optax.smooth_labels(labels, recipe.label_smoothing)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = recipe.model.apply(
            _variables(state._replace(params=params)),
            augmented_images(recipe, train, batch),
            train=True,
            train_bias=train_bias,
            mutable=["batch_stats"],
        )
        # The sum, since gradients of the mean would underflow in float16.
        total = optax.softmax_cross_entropy(logits, targets).sum()
        return _sum_over_devices(recipe, total), updates.get("batch_stats", {})

    (total, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(
        state.params
    )
    updates, opt_state = recipe.optimizer.update(
        grads, state.opt_state, state.params
    )
    step = state.step + 1
    (params, batch_stats), slow = lookahead(
        (optax.apply_updates(state.params, updates), batch_stats),
        state.slow,
        step,
        steps=recipe.steps,
        every=recipe.lookahead_every,
        decay=recipe.lookahead_decay,
    )
    new = State(step, params, batch_stats, opt_state, slow, state.frozen)
    return new, total / recipe.batch_size


def test_step(
    recipe: Recipe, state: State, test: Split, start: jax.Array
) -> Correct:
    """Classifies test_batch_size images, beginning at start.

    Padding of the last batch is not counted.
    """
    devices = 1 if recipe.axis is None else jax.lax.axis_size(recipe.axis)
    size = padded(recipe.test_batch_size, devices)
    position = _local_shard(recipe, jnp.arange(size))
    index = start + position
    counts = (position < recipe.test_batch_size) & (index < len(test.labels))
    index = jnp.minimum(index, len(test.labels) - 1)
    logits = view_logits(recipe, state, test.images, index)
    labels = test.labels[index]

    def num_correct(logits: jax.Array) -> jax.Array:
        correct = (logits.argmax(-1) == labels) & counts
        return _sum_over_devices(recipe, correct.sum(dtype=jnp.int32))

    flips = logits.shape[1]
    weights = jnp.array([weight for _, weight in VIEWS]) / flips
    mean = jnp.einsum("vfbk,v->bk", logits, weights)
    return Correct(num_correct(logits[0, 0]), num_correct(mean))


test_step.__test__ = False  # for pytest, where it is imported by name


def view_logits(
    recipe: Recipe, state: State, images: jax.Array, index: jax.Array
) -> jax.Array:
    """Returns the logits of every view, (3, 2, B, classes).

    Axis 0 is VIEWS, axis 1 the image and its flip, which is omitted if
    training does not flip. Calls the network once.
    """
    flips = (False,) if recipe.flip == "none" else (False, True)
    size = len(index)
    views = [
        augment.flip_and_translate(
            images,
            index,
            jnp.full(size, flip),
            jnp.broadcast_to(jnp.array(offset), (size, 2)),
        )
        for offset, _ in VIEWS
        for flip in flips
    ]
    images = to_float(
        jnp.concatenate(views), recipe.pixel_mean, recipe.pixel_std
    )
    logits = recipe.model.apply(_variables(state), images, train=False)
    return logits.reshape(len(VIEWS), len(flips), size, -1)


def padded(size: int, devices: int) -> int:
    """Rounds size up to a multiple of the devices."""
    return -(-size // devices) * devices


def _variables(state: State) -> dict[str, Any]:
    return {
        "params": state.params,
        "batch_stats": state.batch_stats,
        FROZEN: state.frozen,
    }


def _local_shard(recipe: Recipe, rows: jax.Array) -> jax.Array:
    """Returns this device's shard of axis 0."""
    if recipe.axis is None:
        return rows
    devices = jax.lax.axis_size(recipe.axis)
    parts = rows.reshape(devices, -1, *rows.shape[1:])
    return parts[jax.lax.axis_index(recipe.axis)]


def _sum_over_devices(recipe: Recipe, part: jax.Array) -> jax.Array:
    """Returns the sum over devices."""
    return part if recipe.axis is None else jax.lax.psum(part, recipe.axis)
