"""What a layer sends, read off the compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm
from jaxbn.testing import collectives
from train import batching
from train.augment import Augmentation
from train.optimizer import sgd
from train.pipeline import Feed
from train.programs import make_train_program
from train.recipe import Recipe
from train.resnet import ResNet
from train.state import abstract_state
from train.topology import Topology

C, FLOAT = 6, 4
X = jax.ShapeDtypeStruct((16, 4, 4, C), jnp.float32)


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def forward(module, x, mask=None):
    ones, zeros = jnp.ones(C), jnp.zeros(C)
    variables = {
        "params": {"scale": ones, "bias": zeros},
        "batch_stats": {"mean": zeros, "var": ones},
    }
    return module.apply(variables, x, mask=mask, mutable=["batch_stats"])


def backward(module, x, cotangent):
    """With respect to x alone: parameters reduce over devices themselves."""
    (
        (_, state),
        pull,
    ) = jax.vjp(functools.partial(forward, module), x)
    zeros = jax.tree.map(jnp.zeros_like, state)
    return pull((cotangent, zeros))[0], state


def sent(fn, *args, specs, **fields):
    module = BatchNorm(axis_name="data", use_running_average=False, **fields)
    run = jax.shard_map(
        functools.partial(fn, module),
        mesh=mesh(),
        in_specs=(P("data"),) * len(args),
        out_specs=specs,
    )
    return collectives(run, *args)


@pytest.mark.parametrize("masked, floats", [(False, 2 * C), (True, 2 * C + 1)])
def test_forward_is_one_all_reduce(masked, floats):
    mask = (jax.ShapeDtypeStruct((16, 1, 1, 1), bool),) if masked else ()
    got = sent(forward, X, *mask, specs=(P("data"), P()))
    assert got == {"all-reduce": (1, floats * FLOAT)}
    # Sums about the mean, where those about the running mean would cancel.
    assert got.conditional == {"all-reduce": (1, 2 * C * FLOAT)}


def test_backward_is_one_more_of_two_floats_a_channel():
    got = sent(backward, X, X, specs=(P("data"), P()))
    assert got == {"all-reduce": (2, (2 * C + 2 * C) * FLOAT)}


def test_no_reduction_is_left_to_the_compiler_to_merge():
    module = BatchNorm(axis_name="data", use_running_average=False)
    run = jax.shard_map(
        functools.partial(backward, module),
        mesh=mesh(),
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P()),
    )
    traced = jax.jit(run).trace(X, X)

    def count(platform):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        return program.count("stablehlo.all_reduce")

    # Forward, backward, and the one that seldom runs.
    assert count("cpu") == count("tpu") == 3
    # Of a sample, forward and backward; all of them run.
    assert count("cuda") == count("rocm") == 3


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_sharded_arrays_under_jit_send_as_much(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x = jax.ShapeDtypeStruct(
        X.shape, X.dtype, sharding=NamedSharding(mesh, P("data"))
    )
    module = BatchNorm(axis_name="data", use_running_average=False)
    with jax.set_mesh(mesh):
        once = collectives(functools.partial(forward, module), x)
        twice = collectives(functools.partial(backward, module), x, x)
    assert once == {"all-reduce": (1, 2 * C * FLOAT)}
    assert twice == {"all-reduce": (2, 4 * C * FLOAT)}


def test_a_group_gathers_and_one_reduction_serves_running_statistics():
    got = sent(
        forward, X, specs=(P("data"), P()), sharing=jaxbn.Scope(group_size=2)
    )
    assert got["all-gather"] == (1, 2 * 2 * C * FLOAT)
    assert got["all-reduce"] == (1, (2 * C + 1) * FLOAT)


def test_ghost_batches_reduce_for_running_statistics_alone():
    got = sent(
        forward,
        X,
        specs=(P("data"), P()),
        sharing=jaxbn.Scope(normalize_over=1),
    )
    assert got == {"all-reduce": (1, (2 * C + 1) * FLOAT)}


def test_alone_sends_nothing():
    module = BatchNorm(use_running_average=False)
    run = jax.shard_map(
        lambda x: forward(module, x)[0],
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    assert collectives(run, X) == {}


def test_a_training_step_sends_two_a_layer_and_the_gradient():
    optimizer = sgd(
        lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=1e-4
    )
    recipe = Recipe(
        model=ResNet(
            depth=8,
            num_classes=10,
            width=4,
            norm=functools.partial(BatchNorm, momentum=0.9, axis_name="data"),
        ),
        optimizer=optimizer,
        pixel_mean=(0.0,) * 3,
        pixel_std=(1.0,) * 3,
        augmentation=Augmentation(),
    )
    topology = Topology(mesh())
    state = abstract_state(recipe, (8, 8, 3), topology)
    batch = batching.Batch(
        images=np.zeros((8, 8, 8, 3), np.uint8),
        labels=np.zeros(8, np.int32),
        index=np.zeros(8, np.int32),
        where=np.ones(8, bool),
    )
    feed = Feed(None, batch, 0)
    program = make_train_program(recipe, topology, feed, num_batches=1)
    got = collectives(program, state, feed, 0, 0)
    layers = 7
    assert set(got) == {"all-reduce"}
    # The gradient's, with the sums of loss and hits, may take up to two.
    assert 2 * layers + 1 <= got["all-reduce"].count <= 2 * layers + 2
