"""The first residual networks for CIFAR, of section 4.2 of their paper."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from train import UserError
from train.norms import NORMS


def blocks_of(depth: int, *, layers: int, beside: int) -> int:
    """Returns n where depth = layers n + beside: the blocks of a stage.

    Raises:
      UserError: there is no such n, with the nearest depths.
    """
    blocks, rest = divmod(depth - beside, layers)
    if rest or blocks < 1:
        around = sorted({max(n, 1) for n in (blocks, blocks + 1)})
        near = " or ".join(str(layers * n + beside) for n in around)
        raise UserError(
            f"depth={depth} is not {layers}n + {beside}; take {near}."
        )
    return blocks


def convolution(dtype: Any) -> Callable[..., nn.Module]:
    """Returns what makes a layer, 3x3 and without bias, given the channels."""
    return functools.partial(
        nn.Conv,
        kernel_size=(3, 3),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
    )


def halved(x: jax.Array, width: int, stride: int) -> jax.Array:
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


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A)."""

    width: int
    stride: int
    conv: Any
    norm: Any
    zero_init_gamma: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last_gamma = nn.initializers.ones
        if self.zero_init_gamma:
            last_gamma = nn.initializers.zeros
        y = self.conv(self.width, strides=self.stride)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.width)(y)
        y = self.norm(scale_init=last_gamma)(y)
        return nn.relu(halved(x, self.width, self.stride) + y)


class ResNet(nn.Module):
    """ResNet of 6n + 2 layers: three stages of n blocks, width 1x, 2x, 4x.

    Attributes:
      depth: 8, 14, 20, 32, 44, 56, 110, ...
      num_classes: length of the logits.
      width: channels of the first stage.
      norm: what makes a layer, given use_running_average, dtype and
        scale_init; or "jaxbn" or "flax" with the three fields below.
      axis_name: mesh axis that batch statistics are taken over.
      norm_momentum: weight of the old running statistics.
      norm_epsilon: added to the variance.
      zero_init_gamma: starts every block as its shortcut.
      dtype: of the computation; parameters are float32.

    Source: He et al. (2015), Deep Residual Learning for Image Recognition.
    """

    depth: int
    num_classes: int
    width: int = 16
    norm: Any = "jaxbn"
    axis_name: str | None = None
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    zero_init_gamma: bool = False
    dtype: Any = jnp.float32

    @property
    def blocks(self) -> int:
        """Blocks of a stage; UserError where depth does not fit."""
        return blocks_of(self.depth, layers=6, beside=2)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits (B, num_classes) in float32 for images (B, H, W, C)."""
        conv = convolution(self.dtype)
        norm = self.norm
        if isinstance(norm, str):
            norm = functools.partial(
                NORMS[norm],
                momentum=self.norm_momentum,
                epsilon=self.norm_epsilon,
                axis_name=self.axis_name,
            )
        norm = functools.partial(
            norm, use_running_average=not train, dtype=self.dtype
        )
        x = nn.relu(norm()(conv(self.width)(x.astype(self.dtype))))
        for stage in range(3):
            for block in range(self.blocks):
                x = Block(
                    width=self.width * 2**stage,
                    stride=2 if stage and not block else 1,
                    conv=conv,
                    norm=norm,
                    zero_init_gamma=self.zero_init_gamma,
                )(x)
        x = x.mean((1, 2))
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return logits.astype(jnp.float32)
