"""The programs that are compiled: a layer, networks, and train's own steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.bench.gpu_nets import ResNet50
from train.norms import NORMS
from train.resnet18 import ResNet18

AXIS = "data"
STATISTICS = "batch_stats"


class Program(NamedTuple):
    """A jitted function with the shapes it is compiled for."""

    jitted: Any
    arguments: tuple[Any, ...]

    def compile(self) -> jax.stages.Compiled:
        return self.jitted.lower(*self.arguments).compile()


class ConvNet(nn.Module):
    """Layers of 3x3 convolution, norm and ReLU, all of one width."""

    norm: Any
    layers: int = 5
    width: int = 64
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for _ in range(self.layers):
            x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = self.norm(use_running_average=not train, dtype=self.dtype)(x)
            x = nn.relu(x)
        return x


def make_norm(name: str, axis: str | None = AXIS) -> Callable[..., nn.Module]:
    """Returns what makes a layer, synchronized over the axis.

    Args:
      name: jaxbn; flax, with E[x^2] - E[x]^2; stable, flax with
        use_fast_variance=False; none, scale and bias without statistics.
      axis: of the mesh; None on one device.
    """
    if name == "none":
        return NORMS["none"]
    if name == "stable":
        return functools.partial(
            nn.BatchNorm, axis_name=axis, use_fast_variance=False
        )
    return functools.partial(NORMS[name], axis_name=axis)


def layer(mesh: Mesh, norm: str, shape: tuple[int, ...]) -> Program:
    """One layer, forward and backward, on the first device of the mesh.

    An optimization barrier lets the cotangent exist only once y does, as in a
    network. Otherwise XLA computes y and the sums of the backward pass in one
    pass over x.
    """
    module = make_norm(norm, None)(
        use_running_average=False, dtype=jnp.bfloat16
    )
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def run(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def apply(params: Any, x: jax.Array) -> Any:
            return module.apply(
                {**variables, "params": params}, x, mutable=[STATISTICS]
            )

        y, pull, new = jax.vjp(apply, variables["params"], x, has_aux=True)
        y, cotangent = jax.lax.optimization_barrier((y, cotangent))
        return y, new, pull(cotangent)

    one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    jitted = jax.jit(run, in_shardings=one, out_shardings=one)
    return Program(jitted, (variables, x, x))


def half_mean_square(y: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.square(y.astype(jnp.float32)).mean() / 2


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
    ).mean()


def training_step(
    mesh: Mesh,
    model: nn.Module,
    images: tuple[int, ...],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
) -> Program:
    """Forward, backward and SGD with momentum, under `shard_map`.

    Args:
      mesh: that the batch is split over; parameters are on every device.
      model: called with (images, train=True).
      images: (B, H, W, C) of one device.
      loss: of (model's result, labels), a mean over the examples.
    """
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, momentum = state

        def total(params: Any) -> tuple[jax.Array, Any]:
            y, new = model.apply(
                {"params": params, STATISTICS: stats},
                images,
                train=True,
                mutable=[STATISTICS],
            )
            value = jax.lax.pmean(loss(y, labels), AXIS)
            return value, new.get(STATISTICS, {})

        (value, new), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return (optax.apply_updates(params, updates), new, momentum), value

    def init(key: jax.Array) -> Any:
        x = jnp.zeros((1, *images[1:]), jnp.bfloat16)
        variables = model.init(key, x, train=False)
        params = variables["params"]
        stats = variables.get(STATISTICS, {})
        return params, stats, optimizer.init(params)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(AXIS), P(AXIS)),
        out_specs=P(),
        check_vma=True,
    )
    batch = images[0] * mesh.size
    arguments = (
        jax.eval_shape(init, jax.random.key(0)),
        jax.ShapeDtypeStruct((batch, *images[1:]), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    shardings = (
        NamedSharding(mesh, P()),
        NamedSharding(mesh, P(AXIS)),
        NamedSharding(mesh, P(AXIS)),
    )
    jitted = jax.jit(sharded, in_shardings=shardings, donate_argnums=0)
    return Program(jitted, arguments)


def net(mesh: Mesh, norm: str, batch: int) -> Program:
    """Five layers of 64 channels at 32x32."""
    model = ConvNet(make_norm(norm))
    images = (batch, 32, 32, 64)
    return training_step(mesh, model, images, half_mean_square)


def resnet18(mesh: Mesh, norm: str, batch: int) -> Program:
    """ResNet-18 for 32x32 images."""
    model = ResNet18(10, norm=make_norm(norm), dtype=jnp.bfloat16)
    return training_step(mesh, model, (batch, 32, 32, 3), cross_entropy)


def resnet50(mesh: Mesh, norm: str, batch: int) -> Program:
    """ResNet-50 of ImageNet."""
    model = ResNet50(1000, norm=make_norm(norm), dtype=jnp.bfloat16)
    return training_step(mesh, model, (batch, 224, 224, 3), cross_entropy)
