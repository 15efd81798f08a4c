"""ResNet-20 on CIFAR-10 in 30 epochs, for two CPU cores.

    python -m train --config configs/resnet20_cifar10_one_cycle.py \
        --workdir runs/r20_one_cycle

90.28% on the test set in 5,681 s on two CPU cores of a shared machine (one run,
seed 0), and 94.27% on the training set.
"""

from ml_collections import ConfigDict

from configs import resnet20_cifar10_short


def get_config() -> ConfigDict:
    """Returns the config."""
    config = resnet20_cifar10_short.get_config()
    config.epochs = 30
    config.learning_rate = 0.3
    return config
