"""ResNet-20 on CIFAR-10 with the recipe of He et al. (2015).

python -m train --config configs/resnet20_cifar10.py --workdir runs/r20

The paper reports 91.25%. Not yet measured here: an estimated 8 hours on two
CPU cores.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config() -> ConfigDict:
    """Returns the config."""
    config = defaults.get_config()
    config.dataset = "cifar10"
    config.depth = 20
    # 390 full batches per epoch: 63,960 steps; 64k in the paper.
    config.epochs = 164
    config.batch_size = 128
    config.learning_rate = 0.1
    config.schedule = "step"
    config.boundaries = (32_000, 48_000)
    config.momentum = 0.9
    config.weight_decay = 1e-4
    return config
