"""All config fields of python -m train.fast and their defaults.

Override any of them on the command line: --config.seeds=3. The defaults are
those of airbench94 (github.com/KellerJordan/cifar10-airbench); see
configs/cifar10_94.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults, for other configs to build on."""
    config = ConfigDict()

    # Data, kept on the device as uint8.
    config.dataset = "cifar10"  # digits, cifar10 or cifar100
    config.data_dir = placeholder(str)  # TFDS directory; default $TFDS_DATA_DIR
    config.train_split = "train"
    config.test_split = "test"
    config.flip = "alternating"  # or random, or none
    config.translate = 2  # maximum in pixels, with reflection padding
    config.cutout = 0  # side of the square in pixels; 0 disables cutout

    # Network.
    config.widths = (64, 256, 256)  # channels of the three blocks
    config.layers = 2  # convolutions per block; 3 adds a residual
    config.whitening_images = 5000  # images to compute the first layer from
    config.whitening_epsilon = 5e-4
    config.logit_scale = 1 / 9  # multiplies the output of the last layer
    # Standard deviation of the last layer's weights; default: as PyTorch.
    config.head_std = placeholder(float)
    # jaxbn, flax, none, or a variant: renorm, ghost, debiased.
    config.norm = "jaxbn"
    config.norm_axes = "all"
    config.norm_momentum = 0.6  # decay of the running statistics
    config.norm_epsilon = 1e-12
    config.norm_options = ConfigDict()  # of jaxbn.linen.BatchNorm
    config.norm_options.normalize_over = placeholder(int)
    config.norm_options.debias = placeholder(bool)
    config.norm_options.ddof = placeholder(int)
    config.dtype = "float16"  # of the computation; or bfloat16, float32

    # Optimization. Rate and decay are per 1024 examples, for summed gradients,
    # so that they need no change with momentum or batch size.
    config.seed = 0
    config.seeds = 10  # runs with seed, seed + 1, ...: mean and deviation
    config.epochs = 9.9  # may be fractional
    config.batch_size = 1024  # global, over all devices
    config.test_batch_size = 2000
    config.label_smoothing = 0.2
    config.optimizer = "sgd"  # or muon, for the 3x3 convolutions
    config.learning_rate = 11.5
    config.momentum = 0.85  # Nesterov
    config.weight_decay = 0.0153
    config.bias_scale = 64.0  # multiplies the rate for batch norm biases
    config.rate_start = 0.2  # fraction of the rate at the first step
    config.rate_peak = 0.23  # fraction of the steps at which the rate peaks
    config.rate_end = 0.07  # fraction of the rate after the last step
    config.whitening_bias_epochs = 3  # after which the bias is frozen
    config.lookahead_every = 5  # steps; 0 disables lookahead
    config.lookahead_decay = (
        0.95**5
    )  # final value; grows with the cube of the step
    # For optimizer="muon"; rates are for the summed loss.
    config.muon = ConfigDict()
    config.muon.learning_rate = 0.24
    config.muon.momentum = 0.6
    config.muon.iterations = 3  # Newton-Schulz iterations
    config.muon.bias_learning_rate = 0.053
    config.muon.head_learning_rate = 0.67

    # Machine.
    config.devices = 1  # to shard the batch over
    config.cpu_devices = 1  # simulated, without accelerators
    # Compile an epoch as one program; default: on accelerators. Slow on CPUs.
    config.scan = placeholder(bool)
    return config
