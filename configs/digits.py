"""ResNet-8 on scikit-learn's handwritten digits: no download.

python -m train

98.1 to 98.6% on the 360 test images (seeds 0 to 3) in about 20 s on two CPU
cores.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config() -> ConfigDict:
    """Returns the config."""
    config = defaults.get_config()
    config.dataset = "digits"
    config.crop_padding = 1
    config.flip = "none"
    config.depth = 8
    config.epochs = 20
    config.batch_size = 64
    config.learning_rate = 0.1
    config.schedule = "one_cycle"
    return config
