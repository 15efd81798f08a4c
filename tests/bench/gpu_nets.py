"""The networks whose layers and steps are measured on an accelerator."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from train import norms
from train.resnet import ResNet
from train.resnet18 import ResNet18

# What makes a layer, by name; "flax" takes E[x^2] - E[x]^2.
NORMS = norms.NORMS | {
    "flax stable": functools.partial(nn.BatchNorm, use_fast_variance=False)
}


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(y.shape[-1], (1, 1), strides=self.stride)(x)
            x = self.norm()(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 of ImageNet, with 53 norms of 26,560 channels together.

    Attributes:
      num_classes: length of the logits.
      norm: what makes a layer, given use_running_average and dtype.
      stages: blocks of each; (3, 4, 6, 3) for 50 layers.
      width: of the first stage's inner convolutions.
      policy: of jax.checkpoint around each block; None is without.
      dtype: of the computation; parameters are float32.

    Source: He et al. (2015), Table 1; the stride on the 3x3 convolution, as
    torchvision has it.
    """

    num_classes: int
    norm: Any
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    policy: Any = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.norm, use_running_average=not train, dtype=self.dtype
        )
        block = Bottleneck
        if self.policy is not None:
            block = nn.remat(block, policy=self.policy)
        x = conv(self.width, (7, 7), strides=2, padding=3)(x)
        x = nn.relu(norm()(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                x = block(self.width * 2**stage, stride, conv, norm)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))
        return x.astype(jnp.float32)


class Network(NamedTuple):
    """One network at one size; build takes a norm's name and a policy."""

    name: str
    kind: str  # "ResNet-50", "ResNet-18" or "ResNet-20"
    images: tuple[int, int, int, int]
    classes: int
    width: int = 64
    stages: tuple[int, ...] = (3, 4, 6, 3)  # of bottlenecks

    @property
    def bottleneck(self) -> bool:
        return self.kind == "ResNet-50"

    def build(
        self, norm: str, dtype: str = "bfloat16", policy: Any = None
    ) -> nn.Module:
        fields = {
            "num_classes": self.classes,
            "width": self.width,
            "norm": NORMS[norm],
            "dtype": jnp.dtype(dtype),
        }
        if self.bottleneck:
            return ResNet50(stages=self.stages, policy=policy, **fields)
        if self.kind == "ResNet-18":
            return ResNet18(**fields)
        return ResNet(depth=20, **fields)


LARGE = (
    Network("ResNet-50", "ResNet-50", (256, 224, 224, 3), 1000),
    Network("ResNet-18 (CIFAR)", "ResNet-18", (1024, 32, 32, 3), 10),
)
# Whose kernels take so little time that starting them counts.
SMALL = Network("ResNet-20", "ResNet-20", (128, 32, 32, 3), 10, 16)
QUICK = (Network("one bottleneck", "ResNet-50", (4, 16, 16, 3), 10, 4, (1,)),)
