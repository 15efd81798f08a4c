"""Pre-activation ResNet-110 and -164 on CIFAR, by He et al. (2016).

    python -m train --config configs/preact_cifar.py:164,cifar100 \
        --workdir runs/p164

The argument is a depth and a data set in any order; default 110,cifar10.

| depth | CIFAR-10 (paper) | CIFAR-100 (paper) | parameters |
|---|---|---|---|
| 110 | 93.63% | | 1.7M |
| 164, bottlenecks | 94.54% | 75.67% | 1.7M |

Test accuracy, median of five runs. Neither accuracy nor time has been measured
here.
"""

from ml_collections import ConfigDict

from configs import arguments, resnet20_cifar10, resnet_cifar

DEPTHS = ("110", "164")


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config."""
    depth, dataset = arguments.choose(
        "preact_cifar.py", argument, DEPTHS, arguments.DATASETS
    )
    config = resnet20_cifar10.get_config()
    config.dataset = dataset
    config.model = "preact_bottleneck" if depth == "164" else "preact"
    config.depth = int(depth)
    resnet_cifar.warm_up(config)
    return config
