"""ResNet-18 on CIFAR: 200 epochs of a cosine.

    python -m train --config configs/resnet18_cifar.py:cifar100 \
        --workdir runs/r18

Behind the colon a data set; cifar10 without. 11.2M parameters. No paper has
this net with this recipe; both are those of github.com/kuangliu/pytorch-cifar,
which lists 93.02% on CIFAR-10 for an older recipe. Neither accuracy nor time
was measured here.
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
