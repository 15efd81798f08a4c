"""Batch normalization with exact statistics for any sharding of the batch.

This is the functional core, which does not depend on flax. For modules see
`jaxbn.linen` and `jaxbn.nnx`; to test your own models see `jaxbn.testing`.
"""

from jaxbn._batch_norm import batch_norm, standardize
from jaxbn._inference import normalize, normalize_weighted
from jaxbn._moments import merge, moments, sync
from jaxbn._options import ExampleWeight, Prior, Running
from jaxbn._passes import Moments
from jaxbn._pool import pool
from jaxbn._renorm import batch_renorm, renorm_limits
from jaxbn._running import (
    RunningStats,
    adapt,
    init_running,
    is_finite,
    update_running,
)
from jaxbn._scope import Scope
from jaxbn._shuffle import shuffle, unshuffle

__all__ = [
    "ExampleWeight",
    "Moments",
    "Prior",
    "Running",
    "RunningStats",
    "Scope",
    "adapt",
    "batch_norm",
    "batch_renorm",
    "init_running",
    "is_finite",
    "merge",
    "moments",
    "normalize",
    "normalize_weighted",
    "pool",
    "renorm_limits",
    "shuffle",
    "standardize",
    "sync",
    "unshuffle",
    "update_running",
]

__version__ = "0.1.0"
