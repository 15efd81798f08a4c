"""What is kept for the backward pass, sent again, and computed again."""

import collections
import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.nnx
from jaxbn.linen import BatchNorm

pytestmark = pytest.mark.sample(2)

WIDTH, WIDE = 4, 16
SHAPE = (16, 4, 4, WIDE)
NOTHING = jax.checkpoint_policies.nothing_saveable


class Block(nn.Module):
    """The bottleneck of a ResNet."""

    axis_name: str | None = None
    group_size: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm,
            use_running_average=False,
            axis_name=self.axis_name,
            sharing=jaxbn.Scope(group_size=self.group_size),
            dtype=self.dtype,
        )
        y = nn.relu(norm()(conv(WIDTH, (1, 1))(x)))
        y = nn.relu(norm()(conv(WIDTH, (3, 3))(y)))
        return nn.relu(x + norm()(conv(WIDE, (1, 1))(y)))


def draw():
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(1, 2, (2, *SHAPE)).astype(np.float32)
    return x, cotangent


@functools.cache
def arguments(dtype=jnp.float32):
    """Variables, input and cotangent of the block."""
    x, cotangent = (jnp.asarray(a, dtype) for a in draw())
    variables = jax.jit(Block(dtype=dtype).init)(jax.random.key(0), x)
    return variables, x, cotangent


def train(module, params, stats, x):
    y, new = module.apply(
        {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
    )
    return y, new["batch_stats"]


def step(module, variables, x, cotangent):
    """Output, gradients and new running statistics."""

    def loss(params, x):
        y, new = train(module, params, variables["batch_stats"], x)
        return (y * cotangent).sum(), (y, new)

    grad = jax.grad(loss, (0, 1), has_aux=True)
    (params, dx), (y, stats) = grad(variables["params"], x)
    return (y, dx), (params, stats)


class Program(NamedTuple):
    text: str  # before optimization
    compiled: jax.stages.Compiled

    @property
    def sent(self):
        """Collectives of the compiled program, by kind."""
        kinds = r" (all-reduce|all-gather|reduce-scatter)(?:-start)?\("
        return collections.Counter(re.findall(kinds, self.compiled.as_text()))

    @property
    def convolutions(self):
        return self.text.count("stablehlo.convolution")


@functools.cache
def on_devices(policy, **fields):
    """A step over eight devices; without jax.checkpoint for None."""
    block = Block if policy is None else nn.remat(Block, policy=policy)
    run = jax.shard_map(
        functools.partial(step, block(axis_name="data", **fields)),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P()),
    )
    lowered = jax.jit(run).lower(*arguments())
    return Program(lowered.as_text(), lowered.compile())


def kept(block, params, stats, x):
    """Shapes and dtypes of what jax.vjp keeps besides the arguments.

    Run operation by operation, so that one value is one buffer.
    """

    def run(params, x):
        # Not x itself: the input of the block shall count.
        return train(block, params, stats, x * 2)[0]

    with jax.disable_jit():
        _, pull = jax.vjp(run, params, x)
    own = {a.unsafe_buffer_pointer() for a in jax.tree.leaves((params, x))}
    found = {
        leaf.unsafe_buffer_pointer(): leaf
        for leaf in jax.tree.leaves(pull)
        if isinstance(leaf, jax.Array)
    }
    return collections.Counter(
        (leaf.shape, jnp.dtype(leaf.dtype).name)
        for pointer, leaf in found.items()
        if pointer not in own
    )


@pytest.mark.parametrize(
    "dtype, inputs",
    ((jnp.float32, True), (jnp.float32, False), (jnp.bfloat16, True)),
)
def test_a_block_keeps_convolutions_its_input_and_vectors(dtype, inputs):
    variables, x, _ = arguments(dtype)
    policy = jaxbn.remat.policy(inputs=inputs)
    block = nn.remat(Block, policy=policy)(dtype=dtype)
    got = kept(block, variables["params"], variables["batch_stats"], x)
    name = jnp.dtype(dtype).name
    narrow = (*SHAPE[:-1], WIDTH)
    want = {(SHAPE, name): 1}
    if inputs:
        want = {(SHAPE, name): 2, (narrow, name): 2}
    small = {(), (WIDTH,), (WIDE,)}
    assert {k: n for k, n in got.items() if k[0] not in small} == want
    # The mean, of float32 in two parts, and m2, of two layers.
    parts = 3 if dtype == jnp.float32 else 2
    assert got[(WIDTH,), "float32"] == 2 * parts


def test_more_names_are_kept():
    def run(x):
        y, _ = jaxbn.batch_norm(x)
        return jnp.sin(jax.ad_checkpoint.checkpoint_name(y, "mine"))

    def count(policy):
        block = jax.checkpoint(run, policy=policy)
        with jax.disable_jit():
            _, pull = jax.vjp(block, jnp.asarray(draw()[0]))
        shapes = [a.shape for a in jax.tree.leaves(pull)]
        return shapes.count(SHAPE)

    more = count(jaxbn.remat.policy("mine")) - count(jaxbn.remat.policy())
    assert more == 1


@pytest.mark.parametrize("inputs", (True, False))
def test_on_devices_the_same_numbers_and_nothing_sent_twice(inputs):
    without = on_devices(None)
    again = on_devices(jaxbn.remat.policy(inputs=inputs))
    want, got = (run.compiled(*arguments()) for run in (without, again))
    # Not the same bits: other fusions round other products.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    jax.tree.map(close, got, want)
    assert again.sent == without.sent
    # The backward pass has two convolutions for one of the forward pass.
    assert without.convolutions == 3 * 3
    assert again.convolutions == (9 if inputs else 12)


def test_without_the_policy_statistics_are_sent_twice():
    want = on_devices(None).sent
    assert want["all-reduce"] >= 3 + 3
    assert on_devices(NOTHING).sent["all-reduce"] > want["all-reduce"]


def test_groups_gather_once():
    want = on_devices(None, group_size=2).sent
    policy = jaxbn.remat.policy()
    assert want["all-gather"] and want["all-reduce"]
    assert on_devices(policy, group_size=2).sent == want


def test_derivatives_of_every_kind():
    x, direction, cotangent = np.random.default_rng(0).normal(size=(3, 24, 3))

    def layer(x):
        y, batch = jaxbn.batch_norm(jnp.sin(x))
        return jnp.sin(y) * batch.mean * batch.var

    def every(layer, x, direction, cotangent):
        def loss(x):
            return (layer(x) * cotangent).sum()

        grad, forward = jax.jvp(jax.grad(loss), (x,), (direction,))
        reverse = jax.grad(lambda x: (jax.grad(loss)(x) * direction).sum())
        return jax.jvp(layer, (x,), (direction,)), grad, forward, reverse(x)

    with jax.enable_x64(True):
        arguments = [jnp.asarray(a) for a in (x, direction, cotangent)]
        want = jax.jit(functools.partial(every, layer))(*arguments)
        again = jax.checkpoint(layer, policy=jaxbn.remat.policy())
        got = jax.jit(functools.partial(every, again))(*arguments)
        scale = max(np.abs(a).max() for a in jax.tree.leaves(want))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * scale)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(WIDE, WIDE, (3, 3), use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(WIDE, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


def test_nnx():
    x, cotangent = draw()

    @nnx.jit(static_argnums=0)
    def run(call):
        block = NnxBlock(nnx.Rngs(0))
        grad = nnx.grad(lambda block: (call(block, x) * cotangent).sum())
        return grad(block), nnx.state(block, nnx.BatchStat)

    want = run(NnxBlock.__call__)
    again = nnx.remat(NnxBlock.__call__, policy=jaxbn.remat.policy())
    got = run(again)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want
    )


def test_a_policy_that_is_not_made_yet():
    with pytest.raises(TypeError, match="names must be strings"):
        jaxbn.remat.policy(jnp.float32)
