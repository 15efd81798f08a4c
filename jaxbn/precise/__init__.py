"""Recomputes running statistics exactly over a data set."""

from jaxbn._with_statistics import with_statistics
from jaxbn.precise._recompute import Precise, recompute

__all__ = ["Precise", "recompute", "with_statistics"]
