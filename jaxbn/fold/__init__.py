"""Batch normalization of inference, folded into the layer next to it."""

from jaxbn.fold._fold import Difference, Folded, fold
from jaxbn.fold._report import Layer

__all__ = ["Difference", "Folded", "Layer", "fold"]
