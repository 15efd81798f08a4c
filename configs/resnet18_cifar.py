"""ResNet-18 on CIFAR: 200 epochs with a cosine schedule.

    python -m train --config configs/resnet18_cifar.py:cifar100 \
        --workdir runs/r18

The argument is a data set; default cifar10. 11.2M parameters. Network and
recipe follow github.com/kuangliu/pytorch-cifar, not a paper; it reports 93.02%
on CIFAR-10 for an older recipe. Neither accuracy nor time has been measured
here.
"""

from ml_collections import ConfigDict

from configs import arguments, defaults


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config."""
    (dataset,) = arguments.choose(
        "resnet18_cifar.py", argument, arguments.DATASETS
    )
    config = defaults.get_config()
    config.dataset = dataset
    config.model = "resnet18"
    config.depth = 18
    config.width = 64
    config.epochs = 200
    config.batch_size = 128
    config.learning_rate = 0.1
    config.schedule = "cosine"
    config.momentum = 0.9
    config.weight_decay = 5e-4
    return config
