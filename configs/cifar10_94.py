"""CIFAR-10 to 94% in seconds on one GPU: airbench94, and its Muon variant.

    python -m train.fast --config configs/cifar10_94.py --workdir runs/fast94
    python -m train.fast --config configs/cifar10_94.py:muon --workdir runs/muon

The argument is the optimizer; default sgd. The recipes are those of
github.com/KellerJordan/cifar10-airbench (Jordan, 2024, 94% on CIFAR-10 in 3.29
Seconds on a Single GPU), which reports, in PyTorch on one A100 and with
test-time augmentation:

| optimizer | mean test accuracy | seeds | seconds |
|---|---|---|---|
| sgd | 94.01% | 1000 | 3.83 (3.09 compiled) |
| muon | 94.01% | 200 | 2.59 |

Measured here on one NVIDIA H200 (jax 0.11.2), with test-time augmentation:

| optimizer | mean test accuracy | seeds | seconds |
|---|---|---|---|
| sgd | 93.97% (deviation 0.17) | 10 | 1.487 |
| muon | 94.07% (deviation 0.16) | 10 | 1.202 |

Differences: weights are stored in float32 and cast to float16 for the
computation; the first layer is computed from the first 5,000 images in the
order of TFDS; mirrored test views are flipped before they are translated, not
after; and with Muon the bias of the first layer starts at zero.
"""

from ml_collections import ConfigDict

from configs import arguments, fast_defaults

OPTIMIZERS = ("sgd", "muon")


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config."""
    (optimizer,) = arguments.choose("cifar10_94.py", argument, OPTIMIZERS)
    config = fast_defaults.get_config()
    config.optimizer = optimizer
    if optimizer == "muon":
        config.batch_size = 2000
        config.epochs = 8.0
        config.logit_scale = 1 / 256
        config.head_std = 1.0
        # 2e-6 per example and step, with a momentum of 0.85.
        config.weight_decay = 2e-6 * 1024 * (1 + 1 / (1 - config.momentum))
        config.rate_start, config.rate_peak, config.rate_end = 1.0, 0.0, 0.0
        config.lookahead_every = 0
    return config
