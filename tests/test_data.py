"""Digits, splits and batches; and the real CIFAR-10, where it is."""

import os
import pathlib

import numpy as np
import pytest

from train import UserError, batching, data


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits")


def fails(*args, **kwargs) -> str:
    """Returns the message of the UserError that `load` raises."""
    with pytest.raises(UserError) as caught:
        data.load_dataset(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


# digits


def test_digits_sizes_and_values(digits):
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert digits.num_classes == 10
    for split in digits[:2]:
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.shape[0] == split.labels.shape[0]
        assert (split.images.min(), split.images.max()) == (0, 255)


def test_digits_splits_share_out_all_examples(digits):
    from sklearn.datasets import load_digits

    def keys(images):
        return [image.tobytes() for image in images]

    originals = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert len(set(keys(originals))) == 1797  # so that bytes identify
    train, test = keys(digits.train.images), keys(digits.test.images)
    assert sorted(train + test) == sorted(keys(originals))


def test_digits_labels_belong_to_images(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    originals = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    label = {x.tobytes(): y for x, y in zip(originals, bunch.target)}
    for split in digits[:2]:
        got = [label[image.tobytes()] for image in split.images]
        np.testing.assert_array_equal(got, split.labels)


def test_digits_classes_are_balanced(digits):
    train = np.bincount(digits.train.labels, minlength=10)
    test = np.bincount(digits.test.labels, minlength=10)
    assert (np.abs(test - (train + test) / 5) < 1).all()


# Splits


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("train", slice(0, 1437)),
        ("train[:1000]", slice(0, 1000)),
        ("train[1000:]", slice(1000, 1437)),
        ("train[90%:]", slice(1293, 1437)),
        ("train[-7:]", slice(1430, 1437)),
        ("train[5:6]", slice(5, 6)),
    ],
)
def test_split_expression(digits, expression, want):
    got = data.load_dataset(
        "digits", train_split=expression, test_split=expression
    )
    for split in got[:2]:
        np.testing.assert_array_equal(split.images, digits.train.images[want])
        np.testing.assert_array_equal(split.labels, digits.train.labels[want])


def test_split_sum_keeps_its_order(digits):
    got = data.load_dataset("digits", train_split="test[:3]+train[:2]").train
    want = [*digits.test.labels[:3], *digits.train.labels[:2]]
    np.testing.assert_array_equal(got.labels, want)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "validation",
        "train[",
        "train[5]",
        "train[a:b]",
        "train[:1.5]",
        "train[:2000]",
        "train[:101%]",
        "all[1:]",
        "train[:0]",
        "train[20:10]",
        "train[1437:]",
    ],
)
@pytest.mark.parametrize("which", ["train_split", "test_split"])
def test_split_that_selects_nothing(which, expression):
    message = fails("digits", **{which: expression})
    assert repr(expression) in message
    assert "train (1437) or test (360)" in message


# Batches


def test_order_depends_on_seed_and_epoch_alone():
    want = data.order(1000, seed=3, epoch=5)
    np.random.seed(0)
    np.testing.assert_array_equal(want, data.order(1000, seed=3, epoch=5))
    np.testing.assert_array_equal(np.sort(want), np.arange(1000))
    for seed, epoch in ((3, 6), (4, 5), (5, 3)):
        assert (want != data.order(1000, seed=seed, epoch=epoch)).any()


def test_train_batches_follow_order_and_drop_the_rest(digits):
    batches = list(batching.train_batches(digits.train, 100, seed=1, epoch=2))
    assert len(batches) == 14
    for batch in batches:
        assert batch.images.shape == (100, 8, 8, 1)
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == batch.index.dtype == np.int32
        assert batch.labels.shape == batch.index.shape == (100,)
        assert batch.where.dtype == bool and batch.where.shape == (100,)
        assert batch.where.all()
        images, labels = (x[batch.index] for x in digits.train)
        np.testing.assert_array_equal(batch.images, images)
        np.testing.assert_array_equal(batch.labels, labels)
    index = np.concatenate([batch.index for batch in batches])
    want = data.order(1437, seed=1, epoch=2)[:1400]
    np.testing.assert_array_equal(index, want)


def test_train_batches_leave_out_others_each_epoch(digits):
    used = [
        {
            int(place)
            for batch in batching.train_batches(
                digits.train, 100, seed=0, epoch=e
            )
            for place in batch.index
        }
        for e in range(2)
    ]
    assert [len(places) for places in used] == [1400, 1400]
    assert used[0] != used[1]


@pytest.mark.parametrize("batch_size", [1438, 0, -1])
def test_train_batch_size_that_does_not_fit(digits, batch_size):
    with pytest.raises(UserError, match=f"{batch_size} must be from 1 to 1437"):
        batching.train_batches(digits.train, batch_size, seed=0, epoch=0)


@pytest.mark.parametrize("batch_size", [1, 100, 120, 360, 500])
def test_test_batches_hold_every_example_once(digits, batch_size):
    batches = list(batching.test_batches(digits.test, batch_size))
    assert all(len(array) == batch_size for b in batches for array in b)
    assert all(batch.where.all() for batch in batches[:-1])
    merged = batching.Batch(*map(np.concatenate, zip(*batches)))
    kept = batching.Batch(*(array[merged.where] for array in merged))
    np.testing.assert_array_equal(kept.index, np.arange(360))
    np.testing.assert_array_equal(kept.images, digits.test.images)
    np.testing.assert_array_equal(kept.labels, digits.test.labels)
    for array, dtype in zip(merged, (np.uint8, np.int32, np.int32, bool)):
        assert array.dtype == dtype
        assert not array[~merged.where].any()


def test_test_batch_size_must_be_positive(digits):
    with pytest.raises(UserError, match="Batch size 0 is not positive"):
        batching.test_batches(digits.test, 0)


def test_unknown_name():
    message = fails("CIFAR-10")
    assert "'CIFAR-10'; known: digits, cifar10, cifar100." in message
    assert "Did you mean cifar10?" in message
    assert "Did you mean" not in fails("imagenet")


@pytest.mark.parametrize("name", data.NAMES)
def test_data_dir_must_exist(name, tmp_path):
    missing = str(tmp_path / "missing")
    assert f"{missing!r} does not exist" in fails(name, data_dir=missing)


# The real thing


@pytest.mark.slow
def test_real_cifar10():
    root = os.environ.get("TFDS_DATA_DIR")
    if not root or not pathlib.Path(root, "cifar10").is_dir():
        pytest.skip("TFDS_DATA_DIR does not point at a prepared cifar10")
    train, test, num_classes = data.load_dataset("cifar10")
    assert num_classes == 10
    assert train.images.shape == (50_000, 32, 32, 3)
    assert test.images.shape == (10_000, 32, 32, 3)
    assert (np.bincount(train.labels) == 5_000).all()
    assert (np.bincount(test.labels) == 1_000).all()
    mean = train.images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
