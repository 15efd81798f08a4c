"""Why does batch norm work? Tests published claims in minutes.

Each experiment is a module whose docstring states a claim, with an
`experiment.Experiment`, EXPERIMENT: methods are trained on the same data from
the same seeds, measured, and compared with the claim.
"""

from __future__ import annotations

# Names on the command line and modules of this package, in running order.
EXPERIMENTS = (
    "invariance",
    "tolerance",
    "split",
    "leakage",
    "depth",
    "smoothness",
    "gradient",
    "noise",
    "saturation",
    "recurrent",
)
