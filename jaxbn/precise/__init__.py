"""Running statistics recomputed over a data set, exactly."""

from jaxbn.precise._recompute import Precise, recompute
from jaxbn.precise._statistics import with_statistics

__all__ = ["Precise", "recompute", "with_statistics"]
