"""ResNet-18 for small images: without the initial downsampling."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn.linen import BatchNorm
from train import UserError
from train.resnet import residual_branch, residual_network


class ProjectionBlock(nn.Module):
    """Two 3x3 convolutions and a projection shortcut (option B).

    Attributes:
      width: output channels.
      stride: spatial stride.
      conv: creates a convolution, 3x3 by default.
      norm: creates a norm layer.
      zero_init_gamma: zero-initializes the residual branch.
    """

    width: int
    stride: int
    conv: Any
    norm: Any
    zero_init_gamma: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = residual_branch(self, x)
        if self.stride > 1 or x.shape[-1] != self.width:
            x = self.conv(
                self.width,
                kernel_size=(1, 1),
                strides=self.stride,
                padding=0,
                name="shortcut",
            )(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Four stages of two blocks, width 1x, 2x, 4x, 8x, after a 3x3 convolution.

    ResNet-18 for ImageNet begins with a 7x7 convolution of stride 2 and max
    pooling, for which a 32x32 image is too small.

    Attributes:
      num_classes: number of classes.
      depth: 18.
      width: channels of the first stage.
      norm: creates a norm layer, given use_running_average, dtype and
        scale_init.
      zero_init_gamma: zero-initializes residual branches.
      dtype: dtype of the computation; parameters are float32.

    Source: He et al. (2015), Table 1; github.com/kuangliu/pytorch-cifar.
    """

    num_classes: int
    depth: int = 18
    width: int = 64
    norm: Any = BatchNorm
    zero_init_gamma: bool = False
    dtype: Any = jnp.float32

    @property
    def blocks(self) -> int:
        """Blocks per stage; UserError unless depth is 18."""
        if self.depth != 18:
            raise UserError(f"depth={self.depth} must be 18 for ResNet-18.")
        return 2

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits (B, num_classes) of images (B, H, W, C)."""
        return residual_network(
            self, x, train=train, block=ProjectionBlock, stages=4
        )
