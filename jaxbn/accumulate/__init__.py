"""Gradient accumulation with the results of the whole batch.

A batch that does not fit into memory is split into microbatches. If each of
them is normalized with its own statistics, a different network is trained:
statistics are noisier, running statistics are updated once per microbatch, and
the gradient is not that of the batch. `value_and_grad` returns the value,
gradient and running statistics of the whole batch; it is built on `lockstep`.
"""

from jaxbn.accumulate._accumulate import update_batch_stats, value_and_grad
from jaxbn.accumulate._lockstep import lockstep

__all__ = ["lockstep", "update_batch_stats", "value_and_grad"]
