"""All config fields of python -m train and their defaults.

Override any of them on the command line: --config.batch_size=256.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults, for other configs to build on."""
    config = ConfigDict()

    # Data. Splits are TFDS expressions: train[:45000] and train[45000:] hold
    # out a part of the training set for evaluation.
    config.dataset = "digits"  # digits, cifar10 or cifar100
    config.data_dir = placeholder(str)  # TFDS directory; default $TFDS_DATA_DIR
    config.train_split = "train"
    config.test_split = "test"
    config.crop_padding = 4  # pixels; 0 disables cropping
    config.flip = True

    # Network.
    config.model = "resnet"  # preact, preact_bottleneck, wide, resnet18
    config.depth = 20  # 6n + 2
    config.width = 16  # channels of the first stage
    config.widen = 1  # multiplies width, for model="wide"
    # jaxbn, flax, none, or a variant: renorm, ghost, debiased.
    config.norm = "jaxbn"
    config.norm_axes = "all"  # mesh axes to synchronize over; one axis, or none
    config.norm_momentum = 0.9  # decay of the running statistics
    config.norm_epsilon = 1e-5
    config.norm_options = ConfigDict()  # of jaxbn.linen.BatchNorm
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
    config.batch_size = 128  # global, over all devices
    config.test_batch_size = 1000
    # Microbatches per device, with statistics and gradients of the whole batch;
    # for batches that do not fit into memory.
    config.microbatches = 1
    config.learning_rate = 0.1  # the peak
    config.schedule = "step"  # step, cosine or one_cycle
    config.boundaries = (32_000, 48_000)  # steps at which the rate drops
    config.decay_factor = 0.1  # multiplies the rate at each boundary
    config.warmup_epochs = 0.0  # for step and cosine
    config.warmup_start = 0.0  # initial rate, as a fraction
    config.warmup_shape = "linear"  # or constant
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 1e-4  # on kernels only
    config.label_smoothing = 0.0
    # Decay of an exponential moving average of the weights, evaluated at the end
    # with statistics recomputed over precise_batches; 0 disables it.
    config.average_decay = 0.0
    config.precise_batches = 200
    config.on_nonfinite = "stop"  # or skip, which skips the batch

    # Machine.
    config.mesh = "data"  # or replica=2,data=4: axes to shard the batch over
    config.cpu_devices = 4  # simulated per process, without accelerators
    config.checkpoint_every = 0  # steps; 0: only after each epoch
    config.profile = False  # writes a trace of ten steps to the workdir
    # Steps per program. More than 1 helps if a step is shorter than its launch:
    # for small networks on accelerators, never on CPUs.
    config.steps_per_dispatch = 1
    return config
