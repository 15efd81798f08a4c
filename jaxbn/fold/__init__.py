"""Folds batch normalization in inference into adjacent layers."""

from jaxbn.fold._fold import Difference, Folded, fold
from jaxbn.fold._report import Layer

__all__ = ["Difference", "Folded", "Layer", "fold"]
