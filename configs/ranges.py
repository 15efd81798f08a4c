"""Valid ranges of numeric config fields, for every program.

Intervals are closed at [ ] and open at ( ); for a tuple the range applies to
each entry. Every numeric field must be listed here.
"""

RANGES = {
    # Data.
    "crop_padding": "[0, 1000]",
    "translate": "[0, 1000]",
    "cutout": "[0, 1000]",
    # Network.
    "depth": "[1, 2000]",
    "width": "[1, 10000]",
    "widen": "[1, 100]",
    "widths": "[1, 10000]",
    "layers": "[2, 3]",
    "whitening_images": "[1, 1e6]",
    "whitening_epsilon": "(0, 1]",
    "logit_scale": "(0, 1000]",
    "head_std": "(0, 1000]",
    "norm_momentum": "[0, 1]",
    "norm_epsilon": "(0, 1]",
    "norm_options.normalize_over": "[1, 1e6]",
    "norm_options.ddof": "[0, 1]",
    # Optimization.
    "seed": "[0, 2147483647]",
    "seeds": "[1, 10000]",
    "epochs": "(0, 1e6]",
    "batch_size": "[1, 1e6]",
    "test_batch_size": "[1, 1e6]",
    "microbatches": "[1, 1e6]",
    "learning_rate": "(0, 1e30]",
    "boundaries": "[1, 2147483647]",
    "decay_factor": "[0, 1]",
    "warmup_epochs": "[0, 1e6]",
    "warmup_start": "[0, 1)",
    "momentum": "[0, 1)",
    "weight_decay": "[0, 10]",
    "label_smoothing": "[0, 1)",
    "average_decay": "[0, 1)",
    "precise_batches": "[1, 1e6]",
    "bias_scale": "[0, 1e6]",
    "rate_start": "[0, 1]",
    "rate_peak": "[0, 1)",
    "rate_end": "[0, 1]",
    "whitening_bias_epochs": "[0, 1e6]",
    "lookahead_every": "[0, 1e6]",
    "lookahead_decay": "[0, 1)",
    "muon.learning_rate": "(0, 1e30]",
    "muon.momentum": "[0, 1)",
    "muon.iterations": "[1, 100]",
    "muon.bias_learning_rate": "[0, 1e30]",
    "muon.head_learning_rate": "[0, 1e30]",
    # Machine.
    "devices": "[1, 512]",
    "cpu_devices": "[1, 512]",
    "checkpoint_every": "[0, 2147483647]",
    "steps_per_dispatch": "[1, 10000]",
}
