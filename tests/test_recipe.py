"""Augmentation, network, optimizer and schedules of a recipe."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import resnet20_cifar10, resnet20_cifar10_short
from train import UserError, augment, schedules
from train.optimizer import sgd
from train.resnet import ResNet

# Augmentation


@functools.partial(jax.jit, static_argnames="padding")
def augmented(seed, index, images, *, padding):
    how = augment.Augmentation(padding=padding, flip="random")
    draws = augment.draw(how, index, images.shape[1:], seed=seed, epoch=0)
    return augment.crop_and_flip(
        images,
        jnp.arange(len(images)),
        draws.offset,
        draws.flip,
        pad_mode="zeros",
        mean=(0.0,),
        std=(1.0,),
    )


def test_augmentation_is_a_function_of_the_example():
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, (8, 6, 6, 2), np.uint8)
    index = np.array([5, 3, 900, 4, 11, 0, 2, 1])
    together = augmented(0, index, batch, padding=2)
    alone = augmented(0, index[2:3], batch[2:3], padding=2)
    chex.assert_trees_all_equal(together[2:3], alone)
    other = augmented(1, index, batch, padding=2)
    assert (np.asarray(other) != np.asarray(together)).any()


def test_every_crop_and_mirror_occurs_and_nothing_else():
    padding, size = 1, 4
    image = np.arange(1, size * size + 1, dtype=np.uint8)
    image = image.reshape(size, size, 1)
    padded = np.pad(image, [(padding,) * 2] * 2 + [(0, 0)])
    possible = set()
    for i in range(2 * padding + 1):
        for j in range(2 * padding + 1):
            crop = padded[i : i + size, j : j + size]
            crop = crop.astype(np.float32)
            possible |= {crop.tobytes(), crop[:, ::-1].tobytes()}
    images = np.broadcast_to(image, (500, size, size, 1))
    got = augmented(0, np.arange(500), images, padding=padding)
    assert {one.tobytes() for one in np.asarray(got)} == possible


def test_pixel_statistics_are_exact():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    parts = [augment.pixel_counts(part) for part in np.split(pixels, [7, 9])]
    mean, std = augment.pixel_statistics(sum(parts))
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-12)
    floats = augment.to_float(pixels, jnp.array(mean), jnp.array(std))
    np.testing.assert_allclose(floats.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(floats.std((0, 1, 2)), 1, rtol=1e-5)


# Network and optimizer


def test_network_errors():
    model = ResNet(depth=21, num_classes=10)
    with pytest.raises(UserError, match=re.escape("depth=21 must be 6n + 2")):
        jax.eval_shape(
            functools.partial(model.init, train=False),
            jax.random.key(0),
            jnp.zeros((1, 8, 8, 1)),
        )


def test_zero_init_gamma_starts_as_the_shortcut():
    model = ResNet(depth=8, num_classes=10, zero_init_gamma=True)
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), np.zeros((1, 8, 8, 1)))["params"]
    for block in ("Block_0", "Block_1", "Block_2"):
        first, last = (params[block][f"BatchNorm_{i}"] for i in (0, 1))
        assert (first["scale"] == 1).all() and (last["scale"] == 0).all()


def test_only_kernels_decay():
    optimizer = sgd(
        optax.constant_schedule(1.0),
        momentum=0.0,
        nesterov=False,
        weight_decay=0.1,
    )
    params = {
        "Conv_0": {"kernel": jnp.ones(2)},
        "BatchNorm_0": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "Dense_0": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = jax.tree.map(lambda u: bool((u != 0).all()), updates)
    assert decayed == {
        "Conv_0": {"kernel": True},
        "BatchNorm_0": {"scale": False, "bias": False},
        "Dense_0": {"kernel": True, "bias": False},
    }


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(np.array(steps)))


def schedule_of(config, steps_per_epoch):
    return schedules.make_schedule(
        config,
        steps=int(steps_per_epoch * config.epochs),
        steps_per_epoch=steps_per_epoch,
    )


def test_schedules():
    config = resnet20_cifar10.get_config()
    rate = schedule_of(config, 390)
    got = rates(rate, (0, 31_999, 32_001, 48_001, 63_959))
    np.testing.assert_allclose(got, [0.1, 0.1, 0.01, 0.001, 0.001], rtol=1e-5)
    config.update(schedule="cosine", warmup_epochs=1.0, epochs=10)
    rate = schedule_of(config, 100)
    got = rates(rate, (0, 49, 500, 1000))
    want = [0.001, 0.05 * (1 + np.cos(np.pi * 0.049)) / 2, 0.05, 0.0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-8)
    config = resnet20_cifar10_short.get_config()
    rate = schedule_of(config, 390)
    steps = int(390 * config.epochs)
    peak = rates(rate, range(0, steps, 13)).max()
    np.testing.assert_allclose(peak, config.learning_rate, rtol=1e-3)
    assert rates(rate, [steps - 1]) < 1e-3 * peak
