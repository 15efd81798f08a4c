"""Why does batch norm work? Published answers, measured again in minutes.

Each experiment is a module with CLAIM, one sentence, and
run(settings: Settings) -> Finding.
"""

from __future__ import annotations

# Name on the command line, in the order they run -> module.
EXPERIMENTS = {
    "invariance": "train.why.invariance",
    "tolerance": "train.why.tolerance",
    "split": "train.why.split",
    "leakage": "train.why.leakage",
    "depth": "train.why.depth",
    "smoothness": "train.why.smoothness",
    "gradient": "train.why.gradient",
    "noise": "train.why.noise",
    "saturation": "train.why.saturation",
    "recurrent": "train.why.recurrent",
}
