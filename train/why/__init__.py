"""Why does batch norm work? Published claims, measured again in minutes.

Each experiment is a module whose docstring states a published claim, with an
`experiment.Experiment`, EXPERIMENT: arms are trained on the same data from the
same seeds, measured, and compared with the claim.
"""

from __future__ import annotations

# Names on the command line, and modules of this package, in running order.
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
