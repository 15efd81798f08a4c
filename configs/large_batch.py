"""ResNets on CIFAR with a large batch, by Goyal et al. (2017).

    python -m train --config configs/large_batch.py:1024,56,cifar100 \
        --workdir runs/large

Behind the colon a batch size, and depth and data set as for resnet_cifar.py.

The rate grows with the batch, 0.1 for each 128 examples, and is reached within
five epochs from 0.1; every block starts as its shortcut. Epochs, and the
epochs at which the rate drops, are those of the small batch. The paper, on
ImageNet, takes statistics over 32 examples: --config.norm=ghost does; without
it they are those of the whole batch.

The paper has no CIFAR. Neither accuracy nor time was measured here.
"""

from ml_collections import ConfigDict

from configs import arguments, resnet_cifar

BATCHES = ("1024", "256", "512", "2048", "4096")
DROPS = (82, 123)  # epochs: 32k and 48k steps of 128 images


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config."""
    batch, depth, dataset = arguments.choose(
        "large_batch.py",
        argument,
        BATCHES,
        resnet_cifar.DEPTHS,
        arguments.DATASETS,
    )
    config = resnet_cifar.get_config(f"{depth},{dataset}")
    small, size = config.batch_size, int(batch)
    steps = 50_000 // size
    config.batch_size = size
    config.learning_rate = config.learning_rate * size / small
    config.boundaries = tuple(steps * epoch for epoch in DROPS)
    config.warmup_epochs = 5.0
    config.warmup_shape = "linear"
    config.warmup_start = small / size
    config.zero_init_gamma = True
    return config
