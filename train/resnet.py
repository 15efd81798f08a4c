"""The first residual networks for CIFAR, of section 4.2 of their paper."""

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
    """Returns n where depth = layers n + extra: the blocks of a stage.

    Raises:
      UserError: there is no such n, with the nearest depths.
    """
    blocks, rest = divmod(depth - extra, layers)
    if rest or blocks < 1:
        around = sorted({max(n, 1) for n in (blocks, blocks + 1)})
        near = " or ".join(str(layers * n + extra) for n in around)
        raise UserError(
            f"depth={depth} is not {layers}n + {extra}; take {near}."
        )
    return blocks


def convolution(dtype: Any) -> Callable[..., nn.Module]:
    """Returns what makes a layer, 3x3 and without bias, given the channels.

    A pixel of zeros on every side, also before a stride of two: windows about
    the pixels that shortcuts keep. XLA's "SAME" would move them by one.
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
    """Shortcut without parameters: every stride-th pixel, zeros for channels.

    Args:
      x: (B, H, W, C).
      width: channels of the result, at least C.
      stride: between the pixels that are kept.

    Source: He et al. (2015), section 3.3, option A.
    """
    if stride > 1:
        x = x[:, ::stride, ::stride]
    more = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))


def residual_branch(block: nn.Module, x: jax.Array) -> jax.Array:
    """What a block of two 3x3 convolutions adds to its shortcut.

    Args:
      block: in whose scope the layers are made, by its conv and norm.
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
    """The layers of a network whose blocks end with the sum and a ReLU.

    One convolution, stages of net.blocks blocks, each stage of half the height
    and twice the width of the one before, the mean over pixels, and a dense
    layer.

    Args:
      net: in whose scope the layers are made.
      x: images (B, H, W, C).
      train: whether the batch's statistics normalize.
      block: what makes a block.
      stages: how many.

    Returns:
      Logits (B, net.num_classes) in float32.
    """
    conv = convolution(net.dtype)
    norm = functools.partial(
        net.norm, use_running_average=not train, dtype=net.dtype
    )
    x = nn.relu(norm()(conv(net.width)(x.astype(net.dtype))))
    for stage in range(stages):
        for place in range(net.blocks):
            x = block(
                width=net.width * 2**stage,
                stride=2 if stage and not place else 1,
                conv=conv,
                norm=norm,
                zero_init_gamma=net.zero_init_gamma,
            )(x)
    x = x.mean((1, 2))
    logits = nn.Dense(net.num_classes, dtype=net.dtype)(x)
    return logits.astype(jnp.float32)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A)."""

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
      num_classes: length of the logits.
      width: channels of the first stage.
      norm: what makes a layer, given use_running_average, dtype and
        scale_init.
      zero_init_gamma: starts every block as its shortcut.
      dtype: of the computation; parameters are float32.

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
        """Blocks of a stage; UserError where depth does not fit."""
        return blocks_per_stage(self.depth, layers=6, extra=2)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits (B, num_classes) in float32 for images (B, H, W, C)."""
        return residual_network(self, x, train=train, block=Block, stages=3)
