"""`BatchNorm` for flax.nnx, and tools for the statistics of nnx models."""

from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._statistics import batch_moments, batch_norms, set_statistics

__all__ = ["BatchNorm", "batch_moments", "batch_norms", "set_statistics"]

# Messages, pickles and checkpoints name where users find them.
for _name in __all__:
    globals()[_name].__module__ = __name__
