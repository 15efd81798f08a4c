"""Pre-activation ResNets and Wide ResNets."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn.linen import BatchNorm
from train.resnet import blocks_per_stage, convolution, pad_shortcut


class PreActBlock(nn.Module):
    """Pre-activation block: norm, ReLU and convolution, two or three times.

    Two 3x3 convolutions, or a bottleneck: 1x1, 3x3 and 1x1 with a quarter of
    the channels. The first convolution has the stride.

    The branch does not end with a norm, so zero_init zeroes the last
    convolution. Zeroing the last scale would block the gradient, by the ReLU.

    Attributes:
      width: output channels.
      stride: spatial stride.
      bottleneck: three convolutions instead of two.
      first: the shortcut also starts after norm and ReLU.
      project: if the shape changes, the shortcut is a 1x1 convolution after
        norm and ReLU; otherwise `pad_shortcut`.
      conv: creates a convolution, 3x3 by default.
      norm: creates a norm layer.
      zero_init: zero-initializes the residual branch.
    """

    width: int
    stride: int
    bottleneck: bool
    first: bool
    project: bool
    conv: Any
    norm: Any
    zero_init: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.conv
        one = functools.partial(three, kernel_size=(1, 1), padding=0)
        y = nn.relu(self.norm()(x))
        if self.first:
            x = y
        if self.stride > 1 or x.shape[-1] != self.width:
            if self.project:
                x = one(self.width, strides=self.stride, name="shortcut")(y)
            else:
                x = pad_shortcut(x, self.width, self.stride)
        last = {}
        if self.zero_init:
            last = {"kernel_init": nn.initializers.zeros}
        if self.bottleneck:
            y = one(self.width // 4, strides=self.stride)(y)
            y = three(self.width // 4)(nn.relu(self.norm()(y)))
            return x + one(self.width, **last)(nn.relu(self.norm()(y)))
        y = three(self.width, strides=self.stride)(y)
        return x + three(self.width, **last)(nn.relu(self.norm()(y)))


class PreActResNet(nn.Module):
    """The full pre-activation ResNet: three stages of n blocks.

    A block is norm-ReLU-convolution twice, for 6n + 2 layers, or a bottleneck,
    for 9n + 2. The shortcut of the first block starts after its norm and ReLU;
    another norm and ReLU follow the last block. If the shape changes, the
    shortcut is parameter-free (option A), or with bottlenecks a 1x1
    convolution.

    Attributes:
      depth: 20, 56, 110, ...; with bottlenecks 29, 164, 1001, ...
      num_classes: number of classes.
      width: channels of the first stage, a quarter of them with bottlenecks.
      bottleneck: uses bottleneck blocks.
      norm: creates a norm layer, given use_running_average, dtype and
        scale_init.
      zero_init_gamma: zero-initializes residual branches; see `PreActBlock`.
      dtype: dtype of the computation; parameters are float32.

    Source: He et al. (2016), Identity Mappings in Deep Residual Networks.
    """

    depth: int
    num_classes: int
    width: int = 16
    bottleneck: bool = False
    norm: Any = BatchNorm
    zero_init_gamma: bool = False
    dtype: Any = jnp.float32

    @property
    def blocks(self) -> int:
        """Blocks per stage; UserError if depth is invalid."""
        layers = 9 if self.bottleneck else 6
        return blocks_per_stage(self.depth, layers=layers, extra=2)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits (B, num_classes) of images (B, H, W, C)."""
        return _apply_layers(
            self,
            x,
            train=train,
            width=self.width * (4 if self.bottleneck else 1),
            bottleneck=self.bottleneck,
            split_late=True,
            project=self.bottleneck,
        )


class WideResNet(nn.Module):
    """WRN-depth-widen: wide pre-activation blocks without dropout.

    6n + 4 layers: a convolution, then three stages of n blocks, each
    norm-ReLU-convolution twice. If the shape changes, the shortcut is a 1x1
    convolution after norm and ReLU; otherwise it is the identity.

    Attributes:
      depth: 10, 16, 22, 28, 40, ...
      num_classes: number of classes.
      width: channels of the first convolution.
      widen: multiplies the channels of the stages.
      norm: creates a norm layer, given use_running_average, dtype and
        scale_init.
      zero_init_gamma: zero-initializes residual branches; see `PreActBlock`.
      dtype: dtype of the computation; parameters are float32.

    Source: Zagoruyko and Komodakis (2016), Wide Residual Networks.
    """

    depth: int
    num_classes: int
    width: int = 16
    widen: int = 1
    norm: Any = BatchNorm
    zero_init_gamma: bool = False
    dtype: Any = jnp.float32

    @property
    def blocks(self) -> int:
        """Blocks per stage; UserError if depth is invalid."""
        return blocks_per_stage(self.depth, layers=6, extra=4)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns float32 logits (B, num_classes) of images (B, H, W, C)."""
        return _apply_layers(
            self,
            x,
            train=train,
            width=self.width * self.widen,
            bottleneck=False,
            split_late=False,
            project=True,
        )


def _apply_layers(
    net: PreActResNet | WideResNet,
    x: jax.Array,
    *,
    train: bool,
    width: int,
    bottleneck: bool,
    split_late: bool,
    project: bool,
) -> jax.Array:
    """Applies the layers of net; width is that of the first stage."""
    conv = convolution(net.dtype)
    norm = functools.partial(
        net.norm, use_running_average=not train, dtype=net.dtype
    )
    x = conv(net.width)(x.astype(net.dtype))
    for stage in range(3):
        for block in range(net.blocks):
            x = PreActBlock(
                width=width * 2**stage,
                stride=2 if stage and not block else 1,
                bottleneck=bottleneck,
                first=split_late and not stage and not block,
                project=project,
                conv=conv,
                norm=norm,
                zero_init=net.zero_init_gamma,
            )(x)
    x = nn.relu(norm()(x)).mean((1, 2))
    return nn.Dense(net.num_classes, dtype=net.dtype)(x).astype(jnp.float32)
