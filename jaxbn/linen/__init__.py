"""`BatchNorm` for flax.linen, and the batch moments of linen models."""

from jaxbn.linen._batch_moments import batch_moments
from jaxbn.linen._batch_norm import BatchNorm

__all__ = ["BatchNorm", "batch_moments"]

# Messages, pickles and checkpoints name where users find them.
for _name in __all__:
    globals()[_name].__module__ = __name__
