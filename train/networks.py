"""Builds the network that a config names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from train import UserError
from train.config_checks import one_of
from train.fastnet import FastNet
from train.preact import PreActResNet, WideResNet
from train.resnet import ResNet
from train.resnet18 import ResNet18

NETWORKS = {
    "resnet": ResNet,
    "preact": PreActResNet,
    "preact_bottleneck": functools.partial(PreActResNet, bottleneck=True),
    "wide": WideResNet,
    "resnet18": ResNet18,
    "fastnet": FastNet,
}

# Networks in which a norm layer follows each convolution.
NORMALIZED = ("resnet", "resnet18", "fastnet")

# Prefix of the depth in a network's display name.
_TITLES = {
    "resnet": "ResNet",
    "preact": "PreActResNet",
    "preact_bottleneck": "PreActResNet",
    "wide": "WRN",
    "resnet18": "ResNet",
}


def make(
    config: ConfigDict,
    *,
    num_classes: int,
    norm: Callable[..., nn.Module],
    dtype: Any,
) -> nn.Module:
    """Returns the network of a config, not yet initialized.

    Args:
      config: reads model and fastnet, or else depth, width, widen and
        zero_init_gamma.
      num_classes: number of classes.
      norm: creates a norm layer, given use_running_average, dtype and
        scale_init; see `train.norms.make_norm`.
      dtype: dtype of the computation.

    Returns:
      A module that is called with (images, train=...).

    Raises:
      UserError: model is unknown, depth is invalid for it, width or widen is
        not positive, or widen is set for a model other than "wide".
    """
    one_of("model", config.model, NETWORKS)
    for key in ("width", "widen"):
        if config[key] < 1:
            raise UserError(f"{key} must be at least 1; got {config[key]}.")
    options = {}
    if config.model == "wide":
        options["widen"] = config.widen
    elif config.widen != 1:
        raise UserError(
            f"widen={config.widen} is for model='wide'; with "
            f"model={config.model!r} set width."
        )
    if config.model == "fastnet":
        return _fastnet(config, num_classes, norm, dtype)
    network = NETWORKS[config.model](
        depth=config.depth,
        num_classes=num_classes,
        width=config.width,
        norm=norm,
        zero_init_gamma=config.zero_init_gamma,
        dtype=dtype,
        **options,
    )
    _ = network.blocks  # validates depth before compiling
    return network


def _fastnet(
    config: ConfigDict,
    num_classes: int,
    norm: Callable[..., nn.Module],
    dtype: Any,
) -> nn.Module:
    own = config.fastnet
    if config.norm != "none":
        norm = functools.partial(norm, use_scale=False)
    return FastNet(
        num_classes=num_classes,
        widths=tuple(own.widths),
        layers=own.layers,
        norm=norm,
        logit_scale=own.logit_scale,
        head_std=own.head_std,
        whitening_epsilon=own.whitening_epsilon,
        dtype=dtype,
    )


def init_images(config: ConfigDict, examples: int) -> int:
    """Returns the number of training images that initialize the network."""
    if config.model != "fastnet":
        return 1
    return min(config.fastnet.whitening_images, examples)


def title(config: ConfigDict) -> str:
    """Returns the display name of the network, such as WRN-28-10."""
    if config.model == "fastnet":
        return f"FastNet {'/'.join(map(str, config.fastnet.widths))}"
    name = f"{_TITLES[config.model]}-{config.depth}"
    return f"{name}-{config.widen}" if config.model == "wide" else name
