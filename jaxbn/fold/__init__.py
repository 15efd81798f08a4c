"""Batch normalization of inference, folded into the layer in front of it."""

from jaxbn.fold._chain import Layer
from jaxbn.fold._fold import Difference, Folded, fold

__all__ = ["Difference", "Folded", "Layer", "fold"]
