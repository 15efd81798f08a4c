"""Valid ranges of numeric config fields.

Intervals are closed at [ ] and open at ( ); for a tuple the range applies to
each entry. Every numeric field must be listed here.
"""

RANGES = {
    # Data.
    "crop_padding": "[0, 1000]",
    "cutout": "[0, 1000]",
    # Network.
    "depth": "[1, 2000]",
    "width": "[1, 10000]",
    "widen": "[1, 100]",
    "norm_momentum": "[0, 1]",
    "norm_epsilon": "(0, 1]",
    "norm_options.normalize_over": "[1, 1e6]",
    "norm_options.ddof": "[0, 1]",
    "fastnet.widths": "[1, 10000]",
    "fastnet.layers": "[2, 3]",
    "fastnet.logit_scale": "(0, 1000]",
    "fastnet.head_std": "(0, 1000]",
    "fastnet.whitening_images": "[1, 1e6]",
    "fastnet.whitening_epsilon": "(0, 1]",
    "fastnet.whitening_bias_epochs": "[0, 1e6]",
    # Optimization.
    "seed": "[0, 2147483647]",
    "num_seeds": "[1, 10000]",
    "epochs": "[1e-6, 1e6]",
    "batch_size": "[1, 1e6]",
    "test_batch_size": "[1, 1e6]",
    "test_every": "[0, 1e6]",
    "microbatches": "[1, 1e6]",
    "learning_rate": "(0, 1e30]",
    "boundaries": "[1, 2147483647]",
    "decay_factor": "[0, 1]",
    "triangular.start": "[0, 1]",
    "triangular.peak": "[0, 1)",
    "triangular.end": "[0, 1]",
    "warmup_epochs": "[0, 1e6]",
    "warmup_start": "[0, 1)",
    "momentum": "[0, 1)",
    "weight_decay": "[0, 10]",
    "affine_lr_multiplier": "(0, 1e6]",
    "muon.learning_rate": "(0, 1e30]",
    "muon.momentum": "[0, 1)",
    "muon.iterations": "[1, 100]",
    "lookahead_every": "[0, 1e6]",
    "lookahead_decay": "[0, 1)",
    "label_smoothing": "[0, 1)",
    "average_decay": "[0, 1)",
    "precise_batches": "[1, 1e6]",
    # Machine.
    "cpu_devices": "[1, 512]",
    "checkpoint_every": "[0, 2147483647]",
    "steps_per_dispatch": "[0, 10000]",
}
