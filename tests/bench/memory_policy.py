"""A ResNet-50 of small images, whose batch norms are computed again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import jaxbn.linen
from tests.bench import measure

# XLA's CPU compiler removes the barriers that jax.checkpoint sets up, and then
# merges what is computed twice. Compilers of accelerators keep them until the
# program is scheduled, as this one does without that pass.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
GIVEN, CONSTANT = "given", "constant"
NAMED = jax.checkpoint_policies.save_only_these_names("convolution")


class Conv(nn.Conv):
    """Names its result, for a policy where the norm does not."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(super().__call__(x), "convolution")


class Bottleneck(nn.Module):
    width: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(Conv, use_bias=False)
        y = nn.relu(self.norm()(conv(self.width, (1, 1))(x)))
        y = conv(self.width, (3, 3), strides=self.stride)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = conv(y.shape[-1], (1, 1), strides=self.stride)(x)
            x = self.norm()(x)
        return nn.relu(x + y)


class Row(nn.Module):
    """Blocks one after the other; the first may have a stride."""

    blocks: int
    width: int
    stride: int
    norm: Any
    block: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = self.block(self.width, stride, self.norm)(x)
        return x


class ResNet(nn.Module):
    """Stages of bottlenecks, in rows of at most so many.

    Attributes:
      norm: the class of batch norm.
      stages: blocks of each.
      width: of the first stage's inner convolutions.
      block_policy: of jax.checkpoint around each block; None is without.
      row_policy: likewise around each row.
      row: blocks in a row.
    """

    norm: Any
    stages: tuple[int, ...]
    width: int
    block_policy: Any = None
    row_policy: Any = None
    row: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(self.norm, use_running_average=False)
        block, row = Bottleneck, Row
        if self.block_policy is not None:
            block = nn.remat(block, policy=self.block_policy)
        if self.row_policy is not None:
            row = nn.remat(row, policy=self.row_policy)
        x = nn.relu(norm()(Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage, blocks in enumerate(self.stages):
            for start in range(0, blocks, self.row):
                stride = 2 if stage and not start else 1
                here = min(self.row, blocks - start)
                x = row(here, self.width * 2**stage, stride, norm, block)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def programs() -> dict[str, tuple[dict[str, Any], bool]]:
    """Returns name -> (fields of ResNet, whether barriers must be kept)."""
    ours = {"norm": jaxbn.linen.BatchNorm}
    theirs = {"norm": nn.BatchNorm}
    keep = jaxbn.remat.policy()
    least = jaxbn.remat.policy(inputs=False)
    return {
        "jaxbn": (ours, True),
        "jaxbn, each block": (ours | {"block_policy": keep}, True),
        "jaxbn, blocks and rows of four": (
            ours | {"block_policy": keep, "row_policy": keep},
            True,
        ),
        "jaxbn, each block, inputs=False": (
            ours | {"block_policy": least},
            True,
        ),
        "jaxbn, each block, barriers removed": (
            ours | {"block_policy": keep},
            False,
        ),
        "jaxbn, barriers removed": (ours, False),
        "flax": (theirs, True),
        "flax, each block": (theirs | {"block_policy": NAMED}, True),
    }


def loss_of(model: ResNet) -> Callable[..., Any]:
    """Returns (params, stats, images, labels) -> (loss, stats)."""

    def loss(params, stats, images, labels):
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, images, mutable=["batch_stats"])
        wanted = jax.nn.one_hot(labels, 10)
        return -(wanted * jax.nn.log_softmax(logits)).sum(-1).mean(), new

    return loss


def run(quick: bool, on_cpu: bool, say: Callable[[str], None]) -> dict:
    """Measures memory, work and time of one gradient of every program."""
    stages, batch = ((1, 2), 8) if quick else ((3, 4, 6, 3), 64)
    shape = (batch, 32, 32, 3)
    result: dict = {"stages": stages, "shape": shape, "width": 16, "rows": {}}
    calls = {}
    for name, (fields, keep) in programs().items():
        say(f"policy: {name}")
        model = ResNet(stages=stages, width=result["width"], **fields)
        arguments = _arguments(model, shape)
        grad = jax.jit(jax.grad(loss_of(model), has_aux=True))
        compiled = grad.lower(*arguments).compile(
            compiler_options=KEEP_BARRIERS if keep and on_cpu else None
        )
        calls[name] = functools.partial(compiled, *arguments)
        result["rows"][name] = {
            "kept": kept_bytes(loss_of(model), *arguments),
            "temp": compiled.memory_analysis().temp_size_in_bytes,
        }
    seconds = measure.interleaved(calls, rounds=3 if quick else 12)
    base = seconds["jaxbn"]
    for name, row in result["rows"].items():
        row["ms"] = measure.spread(1e3 * seconds[name])
        row["ratio"] = measure.spread(seconds[name] / base)
    return result


def _arguments(model: ResNet, shape: tuple[int, ...]) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(
        lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype),
        abstract["params"],
    )
    stats = jax.tree.map(
        lambda a: jnp.ones(a.shape, a.dtype), abstract["batch_stats"]
    )
    return params, stats, images, jnp.zeros(shape[0], jnp.int32)


def kept_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Returns the bytes that jax.vjp keeps besides arguments and constants.

    A value that is handed on, out of jit or jax.checkpoint, counts once.
    """

    def pull(*args):
        return jax.vjp(lambda first: fn(first, *args[1:])[0], args[0])[1]

    jaxpr = jax.make_jaxpr(pull)(*args).jaxpr
    sources = _sources(jaxpr, [GIVEN] * len(jaxpr.invars))
    kept = {
        source: atom.aval
        for source, atom in zip(sources, jaxpr.outvars)
        if source not in (GIVEN, CONSTANT)
    }
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in kept.values())


def _sources(jaxpr: Any, given: list[Any]) -> list[Any]:
    """Returns of each result which value it is: a value is an object."""
    source = dict(zip(jaxpr.invars, given))

    def of(atom):
        literal = hasattr(atom, "val")
        return CONSTANT if literal else source.get(atom, CONSTANT)

    for eqn in jaxpr.eqns:
        taken = [of(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if all(one == CONSTANT for one in taken):
            got = [CONSTANT] * len(eqn.outvars)
        elif inner is not None:  # of jit and jax.checkpoint
            got = _sources(getattr(inner, "jaxpr", inner), taken)
        elif eqn.primitive.name in ("name", "reduce_precision"):
            got = taken[:1]
        else:
            got = [object() for _ in eqn.outvars]
        source.update(zip(eqn.outvars, got))
    return [of(atom) for atom in jaxpr.outvars]
