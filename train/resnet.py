"""ResNets for CIFAR, He et al. (2015), section 4.2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn.linen import BatchNorm
from train import UserError


def blocks_per_stage(depth: int, *, layers: int, extra: int) -> int:
    """Returns the number of blocks per stage, n of depth = layers n + extra.

    Raises:
      UserError: there is no such n; suggests the nearest depths.
    """
    blocks, rest = divmod(depth - extra, layers)
    if rest or blocks < 1:
        around = sorted({max(n, 1) for n in (blocks, blocks + 1)})
        near = " or ".join(str(layers * n + extra) for n in around)
        raise UserError(
            f"depth={depth} must be {layers}n + {extra}, such as {near}."
        )
    return blocks


def convolution(dtype: Any) -> Callable[..., nn.Module]:
    """Returns a function that creates a 3x3 convolution without bias.

    Pads one pixel on every side, also with stride two, so that windows are
    centered on the pixels of the shortcut. "SAME" would shift them by one.
    """
    return functools.partial(
        nn.Conv,
        kernel_size=(3, 3),
        padding=1,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
    )


def pad_shortcut(x: jax.Array, width: int, stride: int) -> jax.Array:
    """Parameter-free shortcut: strided slicing, and zero padding of channels.

    Args:
      x: (B, H, W, C).
      width: output channels, at least C.
      stride: spatial stride.

    Source: He et al. (2015), section 3.3, option A.
    """
    if stride > 1:
        x = x[:, ::stride, ::stride]
    more = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))


def residual_branch(block: nn.Module, x: jax.Array) -> jax.Array:
    """The residual branch of a block with two 3x3 convolutions.

    Args:
      block: module that the layers belong to; provides conv and norm.
      x: (B, H, W, C).
    """
    last_gamma = nn.initializers.ones
    if block.zero_init_gamma:
        last_gamma = nn.initializers.zeros
    y = block.conv(block.width, strides=block.stride)(x)
    y = nn.relu(block.norm()(y))
    y = block.conv(block.width)(y)
    return block.norm(scale_init=last_gamma)(y)


def residual_network(
    net: nn.Module,
    x: jax.Array,
    *,
    train: bool,
    block: Callable[..., nn.Module],
    stages: int,
) -> jax.Array:
    """Applies a post-activation ResNet.

    A convolution, stages of net.blocks blocks, each with half the resolution
    and twice the channels of the previous one, global average pooling, and a
    dense layer.

    Args:
      net: module that the layers belong to.
      x: images (B, H, W, C).
      train: whether to normalize with batch statistics.
      block: creates a block.
      stages: number of stages.

    Returns:
      Logits (B, net.num_classes) in float32.
    """
    conv = convolution(net.dtype)
    norm = functools.partial(
        net.norm, use_running_average=not train, dtype=net.dtype
    )
    x = nn.relu(norm()(conv(net.width)(x.astype(net.dtype))))
    for stage in range(stages):
        for index in range(net.blocks):
            x = block(
                width=net.width * 2**stage,
                stride=2 if stage and not index else 1,
                conv=conv,
                norm=norm,
                zero_init_gamma=net.zero_init_gamma,
            )(x)
    x = x.mean((1, 2))
    logits = nn.Dense(net.num_classes, dtype=net.dtype)(x)
    return logits.astype(jnp.float32)


class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (option A)."""

    width: int
    stride: int
    conv: Any
    norm: Any
    zero_init_gamma: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = residual_branch(self, x)
        return nn.relu(pad_shortcut(x, self.width, self.stride) + y)


class ResNet(nn.Module):
    """ResNet of 6n + 2 layers: three stages of n blocks, width 1x, 2x, 4x.

    Attributes:
      depth: 8, 14, 20, 32, 44, 56, 110, ...
      num_classes: number of classes.
      width: channels of the first stage.
      norm: creates a norm layer, given use_running_average, dtype and
        scale_init.
      zero_init_gamma: zero-initializes residual branches.
      dtype: dtype of the computation; parameters are float32.

    Source: He et al. (2015), Deep Residual Learning for Image Recognition.
    """

    depth: int
    num_classes: int
    width: int = 16
    norm: Any = BatchNorm
    zero_init_gamma: bool = False
    dtype: Any = jnp.float32

    @property
    def blocks(self) -> int:
        """Blocks per stage; UserError if depth is invalid."""
        return blocks_per_stage(self.depth, layers=6, extra=2)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits (B, num_classes) of images (B, H, W, C)."""
        return residual_network(self, x, train=train, block=Block, stages=3)
