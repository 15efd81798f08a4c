"""Gradient accumulation that gives what the whole batch would give.

A batch that does not fit into memory is cut into microbatches. Run one after
the other, each with its own statistics, they train another network: statistics
are noisier, running statistics move once a microbatch, and the gradient is not
that of the batch. `value_and_grad` gives value, gradient and running statistics
of the whole batch; `lockstep` is what it is made of.
"""

from jaxbn.accumulate._accumulate import update_batch_stats, value_and_grad
from jaxbn.accumulate._lockstep import lockstep

__all__ = ["lockstep", "update_batch_stats", "value_and_grad"]
