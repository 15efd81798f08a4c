"""FastNet: a small convolutional network with identity initialization."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from train.fast.whitening import SIDE

# Collection of the first layer's filters, which are not trained.
FROZEN = "frozen"


def identity_kernel(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
    """Initializer: the first outputs copy the inputs, the others are random.

    The random part is uniform in +-1 / sqrt(fan-in), PyTorch's default.

    Args:
      key: random key.
      shape: (H, W, C, D) of a convolution kernel.
      dtype: dtype of the kernel.

    Returns:
      A kernel of that shape. Output i is input i for i < min(C, D).

    Source: Zagoruyko and Komodakis (2017), DiracNets; Jordan (2024).
    """
    height, width, inputs, outputs = shape
    bound = 1 / math.sqrt(height * width * inputs)
    kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
    same = min(inputs, outputs)
    unit = jnp.eye(inputs, same, dtype=dtype)
    kernel = kernel.at[..., :same].set(0)
    return kernel.at[height // 2, width // 2, :, :same].set(unit)


@jax.custom_jvp
def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max pooling with stride 2.

    The gradient goes to the first maximum of a window, as in
    `flax.linen.max_pool`. XLA uses a scatter for that, which on GPUs moves as
    much memory as the convolutions; here each pixel reads its window once.

    Args:
      x: (B, H, W, C).

    Returns:
      (B, H // 2, W // 2, C); an odd last row or column is dropped.
    """
    return nn.max_pool(x, (2, 2), (2, 2))


@max_pool.defjvp
def _max_pool_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = max_pool(x)
    pixels = _windows(x)
    first = jnp.full(y.shape, 4, jnp.uint8)
    for position in (3, 2, 1, 0):
        pixel = pixels[:, :, position // 2, :, position % 2]
        # NaN compares unequal to all pixels, so it gets no gradient.
        first = jnp.where(pixel == y, jnp.uint8(position), first)
    position = jnp.arange(4, dtype=jnp.uint8).reshape(2, 1, 2, 1)
    taken = first[:, :, None, :, None] == position
    # In the transpose, the barrier follows the zero padding of an odd last row:
    # XLA would fuse the padding into the convolution and write the gradient twice.
    dx = jax.lax.optimization_barrier(dx)
    # A sum with one nonzero term; its transpose is a broadcast and a select.
    return y, jnp.where(taken, _windows(dx), 0).sum((2, 4))


def _windows(x: jax.Array) -> jax.Array:
    """Returns all windows of 2x2 pixels, (B, H // 2, 2, W // 2, 2, C)."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


class Whitening(nn.Module):
    """A 2x2 convolution with a fixed kernel and a trained bias.

    The kernel is in the collection `frozen`, (2, 2, C, 8 C).

    Attributes:
      dtype: dtype of the computation.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train_bias: bool) -> jax.Array:
        channels = x.shape[-1]
        shape = (SIDE, SIDE, channels, 2 * SIDE * SIDE * channels)
        kernel = self.variable(FROZEN, "kernel", jnp.zeros, shape).value
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        if not train_bias:
            bias = jax.lax.stop_gradient(bias)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype)


class Block(nn.Module):
    """Two 3x3 convolutions, the first followed by 2x2 max pooling.

    With a third convolution, the output of the pooled first one is added
    before the last GELU.

    Attributes:
      width: output channels.
      layers: number of convolutions, 2 or 3.
      norm: creates a batch norm layer.
      dtype: dtype of the computation.
    """

    width: int
    layers: int
    norm: Callable[..., nn.Module]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def convolution(x: jax.Array) -> jax.Array:
            return nn.Conv(
                self.width,
                (3, 3),
                use_bias=False,
                kernel_init=identity_kernel,
                dtype=self.dtype,
            )(x)

        def gelu(x: jax.Array) -> jax.Array:
            return nn.gelu(x, approximate=False)

        x = max_pool(convolution(x))
        x = before = gelu(self.norm()(x))
        x = self.norm()(convolution(x))
        if self.layers == 3:
            x = self.norm()(convolution(gelu(x))) + before
        return gelu(x)


class FastNet(nn.Module):
    """Whitening, three blocks, global max pooling, one linear layer.

    Attributes:
      num_classes: number of classes.
      widths: channels of the blocks.
      layers: convolutions per block.
      norm: creates a batch norm layer, given use_running_average and dtype; it
        has a bias and no scale.
      logit_scale: multiplies the logits.
      head_std: standard deviation of the last layer's uniform weights; None
        is 1 / sqrt(3 width), PyTorch's default.
      dtype: dtype of the computation; logits are float32.
    """

    num_classes: int
    widths: tuple[int, ...]
    layers: int
    norm: Callable[..., nn.Module]
    logit_scale: float
    head_std: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, train_bias: bool = True
    ) -> jax.Array:
        """Returns logits (B, num_classes) of images (B, H, W, C)."""
        norm = functools.partial(
            self.norm, use_running_average=not train, dtype=self.dtype
        )
        x = Whitening(self.dtype, name="whitening")(x, train_bias=train_bias)
        x = nn.gelu(x, approximate=False)
        for width in self.widths:
            x = Block(width, self.layers, norm, self.dtype)(x)
        x = x.max((1, 2))
        std = self.head_std
        if std is None:
            std = 1 / math.sqrt(3 * x.shape[-1])
        logits = nn.Dense(
            self.num_classes,
            use_bias=False,
            kernel_init=_uniform(std),
            dtype=self.dtype,
            name="head",
        )(x)
        return logits.astype(jnp.float32) * self.logit_scale


def _uniform(std: float) -> nn.initializers.Initializer:
    bound = std * math.sqrt(3)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
