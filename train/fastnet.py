"""FastNet: a small convolutional network that trains in seconds.

After airbench by Keller Jordan (2024), 94% on CIFAR-10 in 3.29 Seconds on a
Single GPU, arXiv:2404.00498; code at github.com/KellerJordan/cifar10-airbench.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from train import UserError
from train.max_pool import max_pool
from train.whitening import SIDE, whitening_kernel

# Collection of the first layer's filters, which are not trained.
FROZEN = "frozen"

MIN_IMAGE_SIZE = 16  # pixels; smaller images are enlarged


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


class Whitening(nn.Module):
    """A 2x2 convolution that whitens patches, with a trained bias.

    Initialization computes the kernel from its input; it is in the collection
    `frozen`, (2, 2, C, 8 C).

    Attributes:
      epsilon: see `whitening_kernel`.
      train_bias: False stops the gradient of the bias.
      dtype: dtype of the computation.
    """

    epsilon: float
    train_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.variable(
            FROZEN, "kernel", whitening_kernel, x, epsilon=self.epsilon
        ).value
        features = 2 * SIDE * SIDE * x.shape[-1]
        bias = self.param("bias", nn.initializers.zeros, (features,))
        if not self.train_bias:
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
    """Whitening, some blocks, global max pooling, one linear layer.

    Initialize it with some thousand training images, from which the first layer
    is computed.

    Attributes:
      num_classes: number of classes.
      widths: channels of the blocks; each halves height and width.
      layers: convolutions per block, 2 or 3.
      norm: creates a norm layer, given use_running_average and dtype.
      logit_scale: multiplies the logits.
      head_std: standard deviation of the last layer's uniform weights; None
        is 1 / sqrt(3 width), PyTorch's default.
      whitening_epsilon: see `whitening_kernel`.
      train_whitening_bias: False stops the gradient of the first layer's bias,
        and with it the gradient with respect to the first block's input.
      dtype: dtype of the computation; logits are float32.
    """

    num_classes: int
    widths: tuple[int, ...]
    layers: int
    norm: Callable[..., nn.Module]
    logit_scale: float
    head_std: float | None = None
    whitening_epsilon: float = 5e-4
    train_whitening_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits (B, num_classes) of images (B, H, W, C)."""
        x = enlarge(x)
        check_widths(self.widths, x.shape)
        norm = functools.partial(
            self.norm, use_running_average=not train, dtype=self.dtype
        )
        x = Whitening(
            self.whitening_epsilon,
            self.train_whitening_bias,
            self.dtype,
            name="whitening",
        )(x)
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


def enlarge(images: jax.Array) -> jax.Array:
    """Repeats the pixels of images that are too small for three poolings."""
    side = min(images.shape[1:3])
    if side >= MIN_IMAGE_SIZE:
        return images
    times = -(-2 * MIN_IMAGE_SIZE // side)
    return images.repeat(times, 1).repeat(times, 2)


def check_widths(widths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises UserError if there are more blocks than images can be halved.

    Args:
      widths: channels of the blocks.
      shape: (B, H, W, C), enlarged.
    """
    side = min(shape[1:3])
    most = (side - 1).bit_length() - 1
    if len(widths) > most:
        raise UserError(
            f"fastnet.widths={widths} has {len(widths)} blocks, each of which "
            f"halves the image; {side} pixels allow at most {most}."
        )


def _uniform(std: float) -> nn.initializers.Initializer:
    bound = std * math.sqrt(3)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
