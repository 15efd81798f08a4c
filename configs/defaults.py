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
    config.data_on_device = False  # keep all images on every device, as uint8
    config.crop_padding = 4  # pixels; 0 disables cropping
    config.crop_mode = "zeros"  # padding of an image; or reflect
    config.flip = "random"  # alternating: every other epoch; or none
    config.cutout = 0  # side of the square in pixels; 0 disables cutout

    # Network.
    # resnet, preact, preact_bottleneck, wide, resnet18, or fastnet, with
    # config.fastnet.
    config.model = "resnet"
    # 6n + 2; for preact_bottleneck 9n + 2, for wide 6n + 4, for resnet18 18.
    config.depth = 20
    config.width = 16  # channels of the first stage
    config.widen = 1  # multiplies width, for model="wide"
    # jaxbn, flax, none, or a variant: renorm, ghost, debiased.
    config.norm = "jaxbn"
    config.norm_axes = "all"  # mesh axes to synchronize over; one axis, or none
    config.norm_momentum = 0.9  # decay of the running statistics
    config.norm_epsilon = 1e-5  # added to the variance
    config.norm_options = ConfigDict()
    # Options of jaxbn's layer; if unset, its defaults. How many examples share
    # statistics, on any number of devices:
    config.norm_options.normalize_over = placeholder(int)
    config.norm_options.debias = placeholder(bool)  # of running statistics
    config.norm_options.ddof = placeholder(int)  # of the running variance
    config.norm_options.mode = placeholder(str)  # update, keep or frozen
    config.norm_options.skip_nonfinite = placeholder(bool)  # batches
    config.norm_options.train_affine = placeholder(bool)  # scale and bias
    config.zero_init_gamma = False  # the last scale of each residual branch
    config.fastnet = ConfigDict()
    config.fastnet.widths = (64, 256, 256)  # channels of the blocks
    config.fastnet.layers = 2  # convolutions per block; 3 adds a residual
    config.fastnet.logit_scale = 1 / 9  # multiplies the last layer's output
    # Standard deviation of the last layer's weights; default: as PyTorch.
    config.fastnet.head_std = placeholder(float)
    # Training images from which the first layer is computed.
    config.fastnet.whitening_images = 5000
    config.fastnet.whitening_epsilon = 5e-4
    config.fastnet.whitening_bias_epochs = 3  # after which its bias is frozen
    config.dtype = "float32"  # of the computation; or bfloat16, float16

    # Optimization.
    config.seed = 0
    config.num_seeds = 1  # runs, with seed, seed + 1, ...
    config.epochs = 10.0  # may be fractional
    config.batch_size = 128  # global, over all devices
    config.test_batch_size = 1000  # global, over all devices
    config.test_every = 1  # epochs between tests; 0: only after the last
    config.test_time_augmentation = False  # six views of each image: slower
    # Microbatches per device, with statistics and gradients of the whole batch;
    # for batches that do not fit into memory.
    config.microbatches = 1
    # Or muon, for the kernels of convolutions; learning_rate and weight_decay
    # are then of the other parameters.
    config.optimizer = "sgd"
    config.learning_rate = 0.1  # the peak
    config.schedule = "step"  # step, cosine, one_cycle or triangular
    config.boundaries = (32_000, 48_000)  # steps at which the rate drops
    config.decay_factor = 0.1  # multiplies the rate at each boundary
    # For schedule="triangular": initial and final rate, as fractions of the peak,
    # and the step of the peak, as a fraction of all steps.
    config.triangular = ConfigDict()
    config.triangular.start = 0.2
    config.triangular.peak = 0.23
    config.triangular.end = 0.07
    config.warmup_epochs = 0.0  # for step and cosine
    config.warmup_start = 0.0  # initial rate, as a fraction
    config.warmup_shape = "linear"  # or constant
    config.momentum = 0.9  # of SGD
    config.nesterov = False  # whether momentum is Nesterov's
    config.weight_decay = 1e-4  # L2, multiplied by the learning rate
    config.decay_affine = False  # whether biases and scales decay as well
    # Multiplies the learning rate of biases and scales; their decay per step
    # stays the same.
    config.affine_lr_multiplier = 1.0
    # For optimizer="muon", whose updates do not depend on the gradient's scale.
    config.muon = ConfigDict()
    config.muon.learning_rate = 0.24  # the peak, for kernels of convolutions
    config.muon.momentum = 0.6
    config.muon.iterations = 3  # Newton-Schulz iterations
    config.lookahead_every = 0  # steps; 0 disables lookahead
    # Final value; it grows with the cube of the step.
    config.lookahead_decay = 0.95**5
    config.label_smoothing = 0.0  # probability spread over all classes
    # Decay of an exponential moving average of the weights, tested at the end
    # with statistics recomputed over precise_batches; 0 disables it.
    config.average_decay = 0.0
    config.precise_batches = 200
    config.on_nonfinite = "stop"  # or skip the batch; or ignore: no check

    # Machine.
    config.mesh = "data"  # or replica=2,data=4: axes to shard the batch over
    config.cpu_devices = 4  # simulated per process, without accelerators
    config.checkpoint_every = 0  # steps; 0: only after each epoch
    config.profile = False  # writes a trace of ten steps to the workdir
    # Steps per program. More than 1 helps if a step is shorter than its launch:
    # for small networks on accelerators, never on CPUs. With data_on_device, 0
    # is a whole epoch on accelerators, and 1 on CPUs.
    config.steps_per_dispatch = 1
    return config
