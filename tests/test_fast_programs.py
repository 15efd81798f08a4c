"""Programs of the fast runs: by steps, scanned, on several devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers.fast_runs import (
    CLASSES,
    DATASET,
    STEPS,
    TEST,
    compiled,
    first_batch,
    mesh_of,
    plan_program,
    recipe_of,
    small,
    trained,
)
from train.fast import optimizer, programs, step
from train.fast.recipe import Experiment
from train.fast.run import run


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(small())


@pytest.fixture(scope="module")
def by_steps(recipe):
    made = compiled(recipe, scan=False)
    return made, *trained(made, recipe)


# Whole runs


def test_an_epoch_holds_every_example_once():
    make = plan_program()
    first, second, other = make(0, 0), make(0, 1), make(1, 0)
    for plan in (first, second, other):
        assert plan.index.shape == (6, 16)
        assert len(np.unique(plan.index)) == 96
    assert (first.index != second.index).any()
    assert (first.index != other.index).any()
    # An image is seen the other way round in the next epoch.
    flips = [
        dict(zip(plan.index.ravel().tolist(), plan.augmentation.flip.ravel()))
        for plan in (first, second)
    ]
    both = {*flips[0]} & {*flips[1]}
    assert len(both) > 80
    assert all(flips[0][i] != flips[1][i] for i in both)


def test_what_moves_and_what_does_not(by_steps):
    _, (start, one_epoch, end), losses = by_steps
    assert len(losses) == STEPS and int(end.step) == STEPS
    kernels = [s.frozen["whitening"]["kernel"] for s in (start, one_epoch, end)]
    assert np.abs(kernels[0]).max() > 0.1
    np.testing.assert_array_equal(kernels[0], kernels[2])
    bias = [
        np.asarray(s.params["whitening"]["bias"])
        for s in (start, one_epoch, end)
    ]
    assert np.abs(bias[1]).max() > 1e-5 and not bias[0].any()
    np.testing.assert_allclose(bias[2], bias[1], rtol=1e-5)
    moving = [
        jax.tree_util.tree_leaves_with_path((state.params, state.batch_stats))
        for state in (one_epoch, end)
    ]
    for (path, before), (_, after) in zip(*moving):
        frozen = "whitening" in jax.tree_util.keystr(path)
        if not frozen:
            assert (np.asarray(before) != np.asarray(after)).any(), path
    # The run ends with the slow values.
    for fast, slow in zip(
        jax.tree.leaves((end.params, end.batch_stats)),
        jax.tree.leaves(end.slow),
    ):
        np.testing.assert_array_equal(fast, slow)


def test_a_bias_that_has_learned_changes_nothing_else(recipe, by_steps):
    late = recipe._replace(
        optimizer=optimizer.make_optimizer(small(), steps=STEPS, bias_steps=0)
    )
    state = by_steps[1][0]

    @jax.jit
    def both(state, train, batch):
        return [
            step.train_step(late, state, train, batch, train_bias=learns)
            for learns in (True, False)
        ]

    (one, loss), (other, same) = both(state, DATASET.train, first_batch())
    np.testing.assert_allclose(loss, same, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for new in (one, other):
        np.testing.assert_array_equal(new.params["whitening"]["bias"], 0)


def test_scan_changes_nothing(recipe, by_steps):
    made, states, losses = by_steps
    other = compiled(recipe, scan=True)
    others, found = trained(other, recipe)
    np.testing.assert_allclose(found, losses, rtol=2e-4)
    assert_alike(states[1], others[1])
    assert made.evaluate(states[0]) == other.evaluate(others[0])


def assert_alike(one, other):
    """Where two maxima are almost equal a gradient may go either way."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=5e-3)


def test_four_devices_change_nothing(by_steps):
    gradient = jax.shard_map(
        jax.grad(lambda x: jax.lax.erf(x).sum()),
        mesh=mesh_of(4),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    try:
        jax.eval_shape(gradient, jnp.ones(4))
    except ValueError:  # jax 0.12.0, in float32
        pytest.skip("JAX has no derivative of erf under shard_map here")
    _, states, losses = by_steps
    recipe = recipe_of(small(devices=4))
    epoch = functools.partial(programs._scanned_epoch, recipe, 6, True)
    given = jax.device_get(states[0]), DATASET.train, np.int32(0), np.int32(0)
    program, _ = programs._compiled(mesh_of(4), epoch, *given)
    state, found = program(*given)
    np.testing.assert_allclose(found, losses[:6], rtol=2e-4)
    assert_alike(states[1], state)


def test_seeds_share_the_programs_and_differ(recipe, by_steps):
    made, states, losses = by_steps
    _, again = trained(made, recipe)
    assert again == losses
    others, found = trained(made, recipe, seed=1)
    assert abs(np.array(found) - losses).max() > 1e-2
    # The filters come from the data alone.
    np.testing.assert_array_equal(
        others[0].frozen["whitening"]["kernel"],
        states[0].frozen["whitening"]["kernel"],
    )


def test_one_device_waits_for_no_other(by_steps):
    def reductions(devices):
        recipe = recipe_of(small(devices=devices, dtype="float16"))
        program = programs._jitted(
            mesh_of(devices),
            functools.partial(step.train_step, recipe, train_bias=True),
        )
        state = jax.device_get(by_steps[1][0])
        lowered = program.lower(state, DATASET.train, first_batch())
        return lowered.as_text().count("all_reduce")

    # Four layers forwards and backwards, and gradients.
    assert reductions(4) > 8
    assert reductions(1) == 0


def test_the_program_that_a_gpu_gets(by_steps):
    recipe = recipe_of(small(dtype="float16"))
    given = jax.device_get(by_steps[1][0]), DATASET.train, 0, 0

    def text(learns):
        epoch = functools.partial(programs._scanned_epoch, recipe, 6, learns)
        traced = jax.jit(epoch).trace(*given)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def convolutions(text):
        return re.findall(r"stablehlo.convolution.*-> tensor<.*x(f\d+)>", text)

    # Five forwards, four by their kernels and three by their inputs. While the
    # first bias learns there is one more by the input, back to it.
    assert convolutions(text(False)) == ["f16"] * 12
    assert convolutions(text(True)) == ["f16"] * 13
    # One loop, and no branch, so that no host is asked. What chooses the way of
    # GPUs, twice in each of the norms' functions for a width, is a constant.
    assert text(True).count("stablehlo.while") == 1
    assert text(True).count("stablehlo.case") == 2 * 2


# Evaluation


@pytest.fixture(scope="module")
def logits(recipe, by_steps):
    """Returns the logits of any images by a network that has learned a bit."""
    state = by_steps[1][-1]

    @jax.jit
    def look(images):
        return step.view_logits(recipe, state, images, jnp.arange(len(images)))

    return look


def test_views_of_what_is_symmetric(logits):
    images = DATASET.test.images[:10]
    symmetric = np.concatenate([images[:, :, :8], images[:, :, 7::-1]], 2)
    got = np.asarray(logits(symmetric))
    assert got.shape == (3, 2, 10, CLASSES)
    np.testing.assert_allclose(got[:, 0], got[:, 1], rtol=1e-4, atol=1e-5)
    other = np.asarray(logits(images))
    assert np.abs(other[:, 0] - other[:, 1]).max((1, 2)).min() > 1e-4
    assert np.abs(other[0] - other[1]).max() > 1e-4
    same = np.full_like(images, 90)
    got = np.asarray(logits(same))
    np.testing.assert_allclose(
        got, np.broadcast_to(got[:1, :1], got.shape), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("devices, scan", [(1, False), (1, True), (4, True)])
def test_every_test_image_counts_once(by_steps, logits, devices, scan):
    state = by_steps[1][-1]
    views = np.float64(logits(DATASET.test.images))
    plain = views[0, 0].argmax(-1)
    mean = views[0].mean(0) / 2 + views[1:].mean((0, 1)) / 2
    # Every label is right, by one way of looking, but for two images.
    for guess, name in (
        (plain, "single_view"),
        (mean.argmax(-1), "multi_view"),
    ):
        labels = guess.astype(np.int32)
        labels[[0, TEST - 1]] = (labels[[0, TEST - 1]] + 1) % CLASSES
        dataset = DATASET._replace(test=DATASET.test._replace(labels=labels))
        made = evaluation(dataset, devices, scan, state)
        assert int(getattr(made, name)) == TEST - 2


def evaluation(dataset, devices, scan, state):
    """What the programs do, without compiling those of training."""
    recipe = recipe_of(small(devices=devices))
    whole = functools.partial(programs._scanned_test, recipe)
    one = functools.partial(step.test_step, recipe)
    mesh, state = mesh_of(devices), jax.device_get(state)
    if scan:
        made, _ = programs._compiled(mesh, whole, state, dataset.test)
        return made(state, dataset.test)
    starts = programs._starts(recipe, dataset.test)
    made, _ = programs._compiled(mesh, one, state, dataset.test, starts[0])
    each = [made(state, dataset.test, start) for start in starts]
    return jax.tree.map(lambda *counts: sum(counts), *each)


def test_one_run(recipe, by_steps):
    made, states, losses = by_steps
    found = run(made, Experiment(None, DATASET, recipe), 0)
    assert found.seed == 0 and found.seconds > 0
    correct = made.evaluate(states[-1])
    assert found.accuracy == int(correct.single_view) / TEST
    assert found.tta_accuracy == int(correct.multi_view) / TEST
    assert found.loss == pytest.approx(np.mean(losses[6:]))
