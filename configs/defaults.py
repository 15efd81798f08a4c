"""Every field of a run with its default; each config changes some.

Any of them can be set on the command line: --config.batch_size=256.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults, as a config of its own they are not meant."""
    config = ConfigDict()

    # Data. Splits are expressions of TFDS: with train[:45000] and
    # train[45000:] the held-out part of the training set is what is measured.
    config.dataset = "digits"  # digits, cifar10 or cifar100
    config.data_dir = placeholder(str)  # of TFDS; unset: $TFDS_DATA_DIR
    config.train_split = "train"
    config.test_split = "test"
    config.crop_padding = 4  # pixels; 0 does not crop
    config.flip = True

    # Network.
    config.depth = 20  # 6n + 2
    config.width = 16
    config.norm = "jaxbn"  # or flax
    config.norm_momentum = 0.9  # weight of the old running statistics
    config.norm_epsilon = 1e-5
    config.zero_init_gamma = False
    config.dtype = "float32"  # of the computation; or bfloat16

    # Optimization.
    config.seed = 0
    config.epochs = 10
    config.batch_size = 128  # over all devices together
    config.test_batch_size = 1000
    config.learning_rate = 0.1  # the peak
    config.schedule = "step"  # step, cosine or one_cycle
    config.boundaries = (32_000, 48_000)  # steps that divide the rate by ten
    config.warmup_epochs = 0.0  # linear, for step and cosine
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 1e-4  # on kernels only

    # Machine.
    config.cpu_devices = 4  # simulated where there is no accelerator
    return config
