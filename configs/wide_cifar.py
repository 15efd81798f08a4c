"""WRN-16-4 and WRN-28-10 on CIFAR, by Zagoruyko and Komodakis (2016).

    python -m train --config configs/wide_cifar.py:28-10,cifar100 \
        --workdir runs/wrn

The argument is depth-width and a data set in any order; default 16-4,cifar10.

| network | CIFAR-10, test accuracy (paper) | CIFAR-100 (paper) | parameters |
|---|---|---|---|
| 16-4 | 94.98% | 75.97% | 2.7M |
| 28-10 | 96.00% | 80.75% | 36.5M |

Median of five runs without dropout. The paper uses reflection padding and
decays all parameters; here padding is zero, and only kernels are decayed.
Neither accuracy nor time has been measured here.
"""

from ml_collections import ConfigDict

from configs import arguments, defaults

NETS = ("16-4", "28-10")
STEPS = 390  # full batches per epoch


def get_config(argument: str = "") -> ConfigDict:
    """Returns the config."""
    net, dataset = arguments.choose(
        "wide_cifar.py", argument, NETS, arguments.DATASETS
    )
    config = defaults.get_config()
    config.dataset = dataset
    config.model = "wide"
    config.depth, config.widen = map(int, net.split("-"))
    config.epochs = 200
    config.batch_size = 128
    config.learning_rate = 0.1
    config.schedule = "step"
    config.boundaries = (60 * STEPS, 120 * STEPS, 160 * STEPS)
    config.decay_factor = 0.2
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4
    return config
