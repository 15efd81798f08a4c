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
    config.model = "resnet"  # preact, preact_bottleneck, wide, resnet18
    config.depth = 20  # 6n + 2
    config.width = 16  # channels of the first stage
    config.widen = 1  # times width, for model="wide"
    # jaxbn, flax, none, or a variant: renorm, ghost, debiased.
    config.norm = "jaxbn"
    config.norm_axes = "all"  # that are synchronized; an axis, or none
    config.norm_momentum = 0.9  # weight of the old running statistics
    config.norm_epsilon = 1e-5
    config.norm_options = ConfigDict()  # fields of jaxbn.linen.BatchNorm
    config.norm_options.normalize_over = placeholder(int)
    config.norm_options.debias = placeholder(bool)
    config.norm_options.ddof = placeholder(int)
    config.norm_options.frozen = placeholder(bool)
    config.norm_options.train_affine = placeholder(bool)
    config.norm_options.skip_nonfinite = placeholder(bool)
    config.zero_init_gamma = False
    config.dtype = "float32"  # of the computation; or bfloat16

    # Optimization.
    config.seed = 0
    config.seeds = 1  # runs with seed, seed + 1, ...: mean and deviation
    config.epochs = 10
    config.batch_size = 128  # over all devices together
    config.test_batch_size = 1000
    # A device takes its share of a batch in so many parts, with statistics and
    # gradients of the whole; for a batch that does not fit.
    config.microbatches = 1
    config.learning_rate = 0.1  # the peak
    config.schedule = "step"  # step, cosine or one_cycle
    config.boundaries = (32_000, 48_000)  # steps at which the rate falls
    config.decay_factor = 0.1  # that it is then multiplied with
    config.warmup_epochs = 0.0  # for step and cosine
    config.warmup_start = 0.0  # share of the rate that it begins with
    config.warmup_shape = "linear"  # or constant, until it is over
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 1e-4  # on kernels only
    config.label_smoothing = 0.0
    # Of an average of the weights, evaluated at the end beside the last ones
    # with statistics taken anew over so many batches; 0 takes none.
    config.average_decay = 0.0
    config.precise_batches = 200
    config.on_nonfinite = "stop"  # or skip: leaves the batch out, goes on

    # Machine.
    config.mesh = "data"  # or replica=2,data=4: axes that the batch lies on
    config.cpu_devices = 4  # of a process, where there is no accelerator
    config.checkpoint_every = 0  # steps; besides those after each epoch
    config.profile = False  # writes a trace of ten steps into the workdir
    # Batches that one program takes in turn. More than 1 pays where a step is
    # shorter than its launch: small networks on accelerators, never on CPUs.
    config.steps_per_dispatch = 1
    return config
