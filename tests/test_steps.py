"""What a training step may be asked for beyond the plain one."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from configs import digits
from jaxbn import accumulate
from tests.helpers.recipes import init_state, test_program, train_program
from tests.helpers.recipes import make_recipe as plain_recipe
from train import batching, data, norms
from train.augment import Augmentation
from train.optimizer import Lookahead, sgd
from train.recipe import Phase
from train.step import augmented_images
from train.topology import MICROBATCH_AXIS, Topology, make_topology


class Poisoned(nn.Module):
    """A network whose output is NaN where an image is white all over."""

    network: nn.Module

    @nn.compact
    def __call__(self, x, *, train):
        white = (x.min((1, 2, 3)) > 1.9)[:, None]
        return jnp.where(white, jnp.nan, self.network(x, train=train))


class Tiny(nn.Module):
    """Two norms; compiles in a second."""

    norm: object
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1).astype(self.dtype)
        for _ in range(2):
            x = nn.Dense(8, dtype=self.dtype)(x)
            norm = self.norm(use_running_average=not train, dtype=self.dtype)
            x = nn.gelu(norm(x))
        return nn.Dense(10, dtype=self.dtype)(x).astype(jnp.float32)


def network(axis_name="data", dtype=jnp.float32):
    norm = functools.partial(norms.BatchNorm, momentum=0.9, axis_name=axis_name)
    return Poisoned(Tiny(norm, dtype))


def make_recipe(**changes):
    return plain_recipe(
        **{
            "model": network(),
            "augmentation": Augmentation(flip="random"),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def topology():
    auto = (AxisType.Auto,)
    return Topology(jax.make_mesh((8,), ("data",), axis_types=auto))


@pytest.fixture(scope="module")
def batches():
    """Four of 32 images; in the third a share of one device is white."""
    images = data.load_dataset("digits", train_split="train[:128]").train
    found = list(batching.train_batches(images, 32, seed=0, epoch=0))
    found[2].images[8:11] = 255
    return found


def walk(recipe, topology, batches):
    step = train_program(recipe, topology.mesh)
    state = init_state(recipe, (8, 8, 1), topology.mesh)
    states, sums = [], []
    for batch in batches:
        state, got = step(state, topology.put(batch, 32), 0)
        states.append(jax.device_get(state))
        sums.append(jax.device_get(got))
    return states, sums


@pytest.fixture(scope="module")
def skipping(topology, batches):
    recipe = make_recipe(
        on_nonfinite="skip", average_decay=0.75, label_smoothing=0.2
    )
    return recipe, *walk(recipe, topology, batches)


def test_a_batch_that_is_not_finite_leaves_no_trace(skipping):
    _, states, sums = skipping
    before, after = states[1], states[2]
    assert (before.step, before.skipped) == (2, 0)
    assert [int(one.nonfinite) for one in sums] == [0, 0, 1, 0]
    assert sums[2].loss == 0 and sums[2].count == 0
    # It counts as a step, for the schedule too; nothing else has changed.
    counted = optax.tree.set(before.opt_state, count=np.int32(3))
    chex.assert_trees_all_equal(
        after,
        before._replace(
            step=np.int32(3), skipped=np.int32(1), opt_state=counted
        ),
    )
    assert np.isfinite(sums[3].loss)
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), after.params, states[3].params
    )
    assert all(jax.tree.leaves(moved))


def test_the_schedule_counts_the_batches_that_are_left_out(topology, batches):
    """The fourth step takes the rate of the fourth, with the third left out."""
    rates = jnp.array([0.1, 0.1, 0.1, 0.0, 0.5])
    optimizer = sgd(
        lambda count: rates[count], momentum=0.0, nesterov=False, weight_decay=0
    )
    recipe = make_recipe(on_nonfinite="skip", optimizer=optimizer)
    states, _ = walk(recipe, topology, batches)
    counts = [int(optax.tree.get(s.opt_state, "count")) for s in states]
    assert counts == [int(s.step) for s in states] == [1, 2, 3, 4]
    chex.assert_trees_all_equal(states[3].params, states[2].params)
    chex.assert_trees_all_equal(states[2].params, states[1].params)
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b),
        states[0].params,
        states[1].params,
    )
    assert any(jax.tree.leaves(moved))


def test_lookahead_counts_the_batches_that_are_left_out(topology, batches):
    """The third of three is left out; the run still ends with slow values."""
    lookahead = Lookahead(every=4, decay=0.5, steps=3)
    recipe = make_recipe(on_nonfinite="skip", lookahead=lookahead)
    states, _ = walk(recipe, topology, batches[:3])
    assert [int(s.skipped) for s in states] == [0, 0, 1]
    # No period is complete, so these are the initial ones.
    chex.assert_trees_all_equal(states[2].params, states[1].slow[0])
    chex.assert_trees_all_equal(states[2].batch_stats, states[1].slow[1])
    chex.assert_trees_all_equal(states[2].slow, states[1].slow)


@pytest.fixture(scope="module")
def stopping(topology, batches):
    recipe = make_recipe(lookahead=Lookahead(every=2, decay=0.5, steps=9))
    return walk(recipe, topology, batches)


def test_a_run_that_is_to_stop_waits_where_it_was(stopping):
    states, sums = stopping
    for field in ("step", "params", "batch_stats", "opt_state", "slow"):
        for late in states[2:]:
            chex.assert_trees_all_equal(
                getattr(states[1], field), getattr(late, field)
            )
    assert [int(one.nonfinite) for one in sums] == [0, 0, 1, 0]


def test_average_of_the_weights(skipping):
    _, states, _ = skipping
    want = jax.tree.map(
        lambda a, p: 0.75 * np.float64(a) + 0.25 * np.float64(p),
        states[0].average,
        states[1].params,
    )
    chex.assert_trees_all_close(states[1].average, want, rtol=1e-5, atol=1e-7)


def test_label_smoothing(skipping, topology, batches):
    """The first loss, from the logits of the network as it began."""
    recipe, _, sums = skipping
    state = init_state(recipe, (8, 8, 1), topology.mesh)
    variables = state.variables
    model = network(axis_name=None)

    @jax.jit
    def logits_of(variables, batch):
        images = augmented_images(recipe, batch, seed=0, epoch=0)
        trained, _ = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        images = (batch.images - 80.0) / 90.0
        return trained, model.apply(variables, images, train=False)

    def loss(logits, wanted):
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        return -(wanted * log_p).sum()

    trained, tested = logits_of(variables, batches[0])
    hot = np.eye(10)[batches[0].labels]
    want = loss(trained, 0.8 * hot + 0.02)
    np.testing.assert_allclose(sums[0].loss, want, rtol=1e-5)
    test_step = test_program(recipe, topology.mesh)
    got = test_step(variables, topology.put(batches[0], 32))
    np.testing.assert_allclose(got.loss, loss(tested, hot), rtol=1e-5)


@pytest.mark.parametrize("how", ["microbatches", "steps of one dispatch"])
def test_the_same_steps_in_another_way(how, skipping, topology, batches):
    recipe, states, want_sums = skipping
    state = init_state(recipe, (8, 8, 1), topology.mesh)
    if how == "microbatches":
        recipe = recipe._replace(
            microbatches=2, phases=(Phase(0, network(("data", "micro"))),)
        )
        step = train_program(recipe, topology.mesh)
        sums = []
        for batch in batches:
            state, got = step(state, topology.put(batch, 32), 0)
            sums.append(got)
        total = jax.tree.map(lambda *each: sum(each), *sums)
    else:
        ((count, rows),) = batching.stack_batches(batches, [4])
        assert count == 4
        step = train_program(recipe, topology.mesh, steps=4)
        state, total = step(state, topology.put(rows, 32, stacked=True), 0)
    want = jax.tree.map(lambda *each: sum(each), *want_sums)
    chex.assert_trees_all_close(total, want, rtol=1e-5)
    chex.assert_trees_all_close(state, states[-1], rtol=1e-3, atol=1e-5)


def test_stacked_batches():
    batches = [
        batching.Batch(*(np.full((2, 3), i + 10 * j) for j in range(4)))
        for i in range(5)
    ]
    sizes = batching.dispatch_sizes(5, 2)
    assert sizes == [2, 2, 1]
    got = list(batching.stack_batches(batches, sizes))
    assert [count for count, _ in got] == sizes
    np.testing.assert_array_equal(got[1][1].labels[:, 0, 0], [12, 13])
    np.testing.assert_array_equal(got[2][1].labels, batches[4].labels)
    assert got[2][1].labels.shape == (2, 3)
    one_by_one = batching.stack_batches(batches, batching.dispatch_sizes(5, 1))
    assert [b.images[0, 0] for _, b in one_by_one] == [*range(5)]
    assert batching.dispatch_sizes(4, 4) == [4]
    assert batching.dispatch_sizes(0, 4) == []


def test_bfloat16_computes_and_float32_keeps(stopping, topology, batches):
    recipe = make_recipe(model=network(dtype=jnp.bfloat16))
    (state,), (sums,) = walk(recipe, topology, batches[:1])
    kept = (state.params, state.batch_stats, state.opt_state)
    floats = [x for x in jax.tree.leaves(kept) if np.ndim(x)]
    assert {x.dtype for x in floats} == {np.dtype(np.float32)}
    _, (want, *_) = stopping
    np.testing.assert_allclose(sums.loss, want.loss, rtol=0.05)
    assert sums.loss != want.loss


# Whom a layer synchronizes


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    "mesh, axes, groups",
    [
        ("data", "all", [range(16)]),
        ("data", "none", [(2 * i, 2 * i + 1) for i in range(8)]),
        ("replica=2,data", "data", [range(8), range(8, 16)]),
        (
            "replica=2,data",
            "replica",
            [(2 * i, 2 * i + 1, 2 * i + 8, 2 * i + 9) for i in range(4)],
        ),
    ],
)
def test_groups_on_a_mesh(mesh, axes, groups, microbatches):
    """Two examples a device; each group has statistics of its own."""
    config = digits.get_config()
    config.update(mesh=mesh, norm_axes=axes, batch_size=16)
    topology = make_topology(mesh, 16, microbatches)
    layer = norms.make_norm(config, topology, microbatches=microbatches)(
        use_running_average=False
    )
    x = np.random.default_rng(0).normal(3, 2, (16, 5)).astype(np.float32)
    variables = {
        "params": {"scale": np.ones(5), "bias": np.zeros(5)},
        "batch_stats": {"mean": np.zeros(5), "var": np.ones(5)},
    }

    def apply(variables, x):
        def one(variables, x):
            return layer.apply(variables, x, mutable=["batch_stats"])

        if microbatches == 1:
            return one(variables, x)
        y, new = accumulate.lockstep(
            one,
            in_axes=(None, 0),
            out_axes=(0, None),
            axis_name=MICROBATCH_AXIS,
        )(variables, x.reshape(microbatches, -1, 5))
        return y.reshape(-1, 5), new

    sharded = jax.shard_map(
        apply,
        mesh=topology.mesh,
        in_specs=(P(), P(topology.axes)),
        out_specs=(P(topology.axes), P()),
        check_vma=True,
    )
    y, new = jax.jit(sharded)(variables, x)
    want = np.empty((16, 5))
    for group in map(list, groups):
        part = x[group].astype(np.float64)
        want[group] = (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5)
    np.testing.assert_allclose(y, want, atol=1e-5)
    stats = new["batch_stats"]
    x = x.astype(np.float64)
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var(0), rtol=1e-5)
