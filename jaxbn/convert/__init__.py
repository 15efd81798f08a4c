"""Converts models between flax's BatchNorm and jaxbn's, and PyTorch weights."""

from jaxbn.convert._from_torch import from_torch
from jaxbn.convert._models import runs_as, to_flax, to_jaxbn
from jaxbn.convert._to_torch import to_torch
from jaxbn.convert._torch_options import options_from_torch, options_to_torch

__all__ = [
    "from_torch",
    "options_from_torch",
    "options_to_torch",
    "runs_as",
    "to_flax",
    "to_jaxbn",
    "to_torch",
]
