"""Recomputes running statistics exactly over a data set."""

from jaxbn._batch_stats import with_statistics
from jaxbn.precise._recompute import Precise, recompute

__all__ = ["Precise", "recompute", "with_statistics"]
