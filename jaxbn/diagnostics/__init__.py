"""Measures the effects of batch norm on training, for any loss and model.

All functions take pytrees and functions, not modules. `loss(params,
batch_stats, batch)` returns (scalar, new_batch_stats) in training mode; the new
statistics are discarded, so a measurement never changes a model. `apply(params,
batch_stats, x, *, train)` returns logits (B, C).
"""

from jaxbn.diagnostics._activations import (
    ActivationStats,
    GradientTail,
    activation_stats,
    gradient_tail,
)
from jaxbn.diagnostics._influence import influence
from jaxbn.diagnostics._landscape import (
    GradientLine,
    Sharpness,
    gradient_line,
    max_step,
    sharpness,
)
from jaxbn.diagnostics._lipschitz import LipschitzIdentity, lipschitz_identity
from jaxbn.diagnostics._noise import CompanionNoise, companion_noise
from jaxbn.diagnostics._scale import (
    ScaleInvariance,
    angular_update,
    equilibrium_angle,
    scale_invariance,
)
from jaxbn.diagnostics._shift import CovariateShift, internal_covariate_shift
from jaxbn.diagnostics._statistics import (
    EvalGap,
    Evaluation,
    Staleness,
    eval_gap,
    stats_staleness,
)

__all__ = [
    "ActivationStats",
    "CompanionNoise",
    "CovariateShift",
    "EvalGap",
    "Evaluation",
    "GradientLine",
    "GradientTail",
    "LipschitzIdentity",
    "ScaleInvariance",
    "Sharpness",
    "Staleness",
    "activation_stats",
    "angular_update",
    "companion_noise",
    "equilibrium_angle",
    "eval_gap",
    "gradient_line",
    "gradient_tail",
    "influence",
    "internal_covariate_shift",
    "lipschitz_identity",
    "max_step",
    "scale_invariance",
    "sharpness",
    "stats_staleness",
]
