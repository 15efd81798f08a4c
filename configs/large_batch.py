"""ResNets on CIFAR with a large batch, by Goyal et al. (2017).

    python -m train --config configs/large_batch.py:1024,56,cifar100 \
        --workdir runs/large

The argument is a batch size, and depth and data set as in resnet_cifar.py.

The learning rate scales with the batch, 0.1 per 128 examples, after a linear
warmup of five epochs from 0.1; residual branches are zero-initialized. Epochs
and rate drops are those of the small batch. The paper, on ImageNet, computes
statistics over 32 examples, as --config.norm=ghost does; by default they are
those of the whole batch.

The paper has no CIFAR results. Neither accuracy nor time has been measured
here.
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
