"""ResNet-20 to -110 on CIFAR with the recipe of He et al. (2015).

    python -m train --config configs/resnet_cifar.py:56,cifar100 \
        --workdir runs/r56

The argument is a depth and a data set in any order; default 20,cifar10.

| depth | CIFAR-10, test accuracy (paper, Table 6) | parameters |
|---|---|---|
| 20 | 91.25% | 0.27M |
| 32 | 92.49% | 0.46M |
| 44 | 92.83% | 0.66M |
| 56 | 93.03% | 0.85M |
| 110 | 93.57%, best of five; 93.39 ± 0.16% | 1.7M |

The paper has no CIFAR-100 results, and trains on 45,000 of the 50,000 images
used here. Neither accuracy nor time has been measured here.
"""

from ml_collections import ConfigDict

from configs import arguments, resnet20_cifar10

DEPTHS = ("20", "32", "44", "56", "110")


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config."""
    depth, dataset = arguments.choose(
        "resnet_cifar.py", argument, DEPTHS, arguments.DATASETS
    )
    config = resnet20_cifar10.get_config()
    config.dataset = dataset
    config.depth = int(depth)
    if config.depth == 110:
        warm_up(config)
    return config


def warm_up(config: ConfigDict) -> None:
    """Starts with 400 steps at a tenth of the learning rate."""
    config.warmup_epochs = 400 / 390
    config.warmup_shape = "constant"
    config.warmup_start = 0.1
