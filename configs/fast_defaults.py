"""Every field of a fast run with its default; configs of train.fast change some.

Any of them can be set on the command line: --config.seeds=3. The values are
those of airbench94 (github.com/KellerJordan/cifar10-airbench); see
configs/cifar10_94.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults, as a config of its own they are not meant."""
    config = ConfigDict()

    # Data. All of it lies on the device, as uint8.
    config.dataset = "cifar10"  # digits, cifar10 or cifar100
    config.data_dir = placeholder(str)  # of TFDS; unset: $TFDS_DATA_DIR
    config.train_split = "train"
    config.test_split = "test"
    config.flip = "alternating"  # or random, each epoch anew, or none
    config.translate = 2  # pixels at most, the border reflected
    config.cutout = 0  # side of the square that is blanked; 0 blanks none

    # Network.
    config.widths = (64, 256, 256)  # channels of the three groups
    config.layers = 2  # convolutions of a group; 3 adds a residual branch
    config.whitening_images = 5000  # that the first layer is computed from
    config.whitening_epsilon = 5e-4
    config.logit_scale = 1 / 9  # that the last layer's output is multiplied by
    # Deviation of the last layer's weights; unset: uniform, PyTorch's default.
    config.head_std = placeholder(float)
    # jaxbn, flax, none, or a variant: renorm, ghost, debiased.
    config.norm = "jaxbn"
    config.norm_axes = "all"
    config.norm_momentum = 0.6  # weight of the old running statistics
    config.norm_epsilon = 1e-12
    config.norm_options = ConfigDict()  # fields of jaxbn.linen.BatchNorm
    config.norm_options.normalize_over = placeholder(int)
    config.norm_options.debias = placeholder(bool)
    config.norm_options.ddof = placeholder(int)
    config.dtype = "float16"  # of the computation; or bfloat16, float32

    # Optimization. The rate and the decay are those of 1024 examples, of which
    # the gradient is summed, so that neither changes with momentum and batch.
    config.seed = 0
    config.seeds = 10  # runs with seed, seed + 1, ...: mean and deviation
    config.epochs = 9.9  # the last may be a part of one
    config.batch_size = 1024  # over all devices together
    config.test_batch_size = 2000
    config.label_smoothing = 0.2
    config.optimizer = "sgd"  # or muon, for the 3x3 convolutions
    config.learning_rate = 11.5
    config.momentum = 0.85  # of Nesterov
    config.weight_decay = 0.0153
    config.bias_scale = 64.0  # times the rate, for biases of batch norm
    config.rate_start = 0.2  # shares of the rate: at the first step,
    config.rate_peak = 0.23  # 1 after this share of the steps,
    config.rate_end = 0.07  # and after the last step
    config.whitening_bias_epochs = 3  # after which it stays as it is
    config.lookahead_every = 5  # steps; 0 leaves lookahead out
    config.lookahead_decay = 0.95**5  # at the end; grows with the cube
    # Rates for optimizer="muon", as they are: of the summed loss.
    config.muon = ConfigDict()
    config.muon.learning_rate = 0.24
    config.muon.momentum = 0.6
    config.muon.iterations = 3  # of Newton and Schulz
    config.muon.bias_learning_rate = 0.053
    config.muon.head_learning_rate = 0.67

    # Machine.
    config.devices = 1  # that the batch is split over
    config.cpu_devices = 1  # simulated, where there is no accelerator
    # An epoch as one program; unset: on accelerators. On CPUs it is slow.
    config.scan = placeholder(bool)
    return config
