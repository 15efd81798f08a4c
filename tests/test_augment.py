"""Augmentation: what is drawn, and pixels against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import augment


@functools.cache
def program(flip):
    how = augment.Augmentation(padding=2, flip=flip, cutout=3)

    def draw(index, seed, epoch):
        return augment.draw(how, index, (23, 12, 3), seed=seed, epoch=epoch)

    return jax.jit(draw)


def drawn(epoch, index=range(50), seed=0, flip="alternating"):
    return program(flip)(np.array(index, np.int32), seed, epoch)


def test_flips_alternate():
    flips = [np.asarray(drawn(epoch).flip) for epoch in range(4)]
    assert 10 < flips[0].sum() < 40
    np.testing.assert_array_equal(flips[1], ~flips[0])
    np.testing.assert_array_equal(flips[2], flips[0])
    np.testing.assert_array_equal(flips[3], ~flips[0])
    assert (np.asarray(drawn(0, seed=1).flip) != flips[0]).any()
    by_chance = [np.asarray(drawn(e, flip="random").flip) for e in range(2)]
    assert 10 < (by_chance[0] != by_chance[1]).sum() < 40
    assert not np.asarray(drawn(0, flip="none").flip).any()


def test_draws_belong_to_the_example_and_cover_what_they_may():
    whole = drawn(3)
    some = drawn(3, index=(7, 41, 2))
    for all_of_them, picked in zip(whole, some):
        np.testing.assert_array_equal(
            all_of_them[jnp.array([7, 41, 2])], picked
        )
    many = drawn(0, index=range(2000))
    assert set(np.unique(many.offset)) == {-2, -1, 0, 1, 2}
    corners = np.asarray(many.corner)
    assert corners.min() == 0 and corners.max(0).tolist() == [20, 9]
    assert (np.asarray(drawn(1).offset) != np.asarray(drawn(0).offset)).any()


def test_batches_of_an_epoch_are_drawn_at_once():
    index = np.arange(12).reshape(3, 4)
    together = drawn(1, index)
    for number, rows in enumerate(index):
        for whole, part in zip(together, drawn(1, rows)):
            np.testing.assert_array_equal(whole[number], part)


@pytest.mark.parametrize("pad_mode", ["zeros", "reflect"])
def test_pixels_against_numpy(pad_mode):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 7, 9, 3), np.uint8)
    rows = np.array([4, 0, 4, 5])
    flip = np.array([True, False, False, True])
    offset = np.array([[3, -2], [0, 0], [-3, 1], [1, 3]])
    mean, std = (90.0, 100.0, 110.0), (50.0, 60.0, 70.0)
    crop = functools.partial(
        augment.crop_and_flip, pad_mode=pad_mode, mean=mean, std=std
    )
    got = jax.jit(crop)(images, rows, offset, flip)
    assert got.dtype == jnp.float32
    mode = {"zeros": "constant", "reflect": "reflect"}[pad_mode]
    for i, (dy, dx) in enumerate(offset):
        image = (images[rows[i]] - np.array(mean)) / np.array(std)
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode)
        want = padded[3 + dy : 10 + dy, 3 + dx : 12 + dx]
        if flip[i]:
            want = want[:, ::-1]
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


def test_blank_against_numpy():
    images = np.random.default_rng(0).normal(size=(3, 8, 9, 2))
    corner = np.array([[0, 0], [5, 6], [2, 3]])
    want = images.copy()
    for image, (y, x) in zip(want, corner):
        image[y : y + 3, x : x + 3] = 0
    got = augment.cutout(jnp.float32(images), jnp.array(corner), 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert augment.cutout(images, corner, 0) is images
