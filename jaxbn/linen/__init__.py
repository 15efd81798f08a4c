"""`BatchNorm` for flax.linen, and the batch moments of linen models."""

from jaxbn.linen._batch_moments import batch_moments
from jaxbn.linen._batch_norm import BatchNorm

__all__ = ["BatchNorm", "batch_moments"]
