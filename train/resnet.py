"""Residual networks for small images, as in section 4.2 of the paper."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn.linen import BatchNorm
from train import UserError

NORMS = {"jaxbn": BatchNorm, "flax": nn.BatchNorm}


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
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
        more = self.width - x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet of 6n + 2 layers: three stages of n blocks, width 1x, 2x, 4x.

    Attributes:
      depth: 8, 14, 20, 32, 44, 56, 110, ...
      num_classes: length of the logits.
      width: channels of the first stage.
      norm: "jaxbn" or "flax".
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
    norm: str = "jaxbn"
    axis_name: str | None = None
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    zero_init_gamma: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits (B, num_classes) in float32 for images (B, H, W, C)."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise UserError(
                f"depth={self.depth} is not 6n + 2; take 8, 14, 20, 32, 44, "
                "56 or 110."
            )
        if self.norm not in NORMS:
            raise UserError(
                f"norm={self.norm!r} is unknown; take one of {sorted(NORMS)}."
            )
        conv = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
        )
        norm = functools.partial(
            NORMS[self.norm],
            use_running_average=not train,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        x = nn.relu(norm()(conv(self.width)(x.astype(self.dtype))))
        for stage in range(3):
            for block in range(blocks):
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
