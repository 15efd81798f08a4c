"""Rematerialization policies for networks with batch norm.

Saves convolution outputs (the inputs of batch norm) and statistics; normalized
arrays and everything up to the next convolution are recomputed:
`jax.checkpoint(block, policy=jaxbn.remat.policy())`, or in flax
`nn.remat(Block, policy=...)` and `nnx.remat(block, policy=...)`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

__all__ = ["INPUT", "STATISTICS", "policy"]

# Names of `jax.ad_checkpoint.checkpoint_name`, for custom policies.

#: The input of a layer, in its own dtype.
INPUT = "jaxbn_input"
#: The synchronized moments of a layer, one value per feature.
STATISTICS = "jaxbn_statistics"


def policy(*names: str, inputs: bool = True) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint` that saves inputs of batch norm.

    Saves the arguments of the function under `jax.checkpoint`, and for each
    layer in it the input in its own dtype and the statistics. So neither
    convolutions nor statistics are recomputed, and the compiled program has no
    additional all-reduce. Only batch norm, activations and sums between
    convolutions are recomputed.

    A block with convolutions c1, c2, c3 saves its input and the outputs of c1,
    c2 and c3. With several blocks in one function, only the input of the first
    is saved: half of a ResNet's bytes are convolution outputs.

    Args:
      *names: additional names of `jax.ad_checkpoint.checkpoint_name` to save.
      inputs: False only saves the statistics: the minimum of memory without
        repeated collectives, at the cost of recomputing the convolutions.

    Returns:
      The policy, for `jax.checkpoint`, `flax.linen.remat`, `flax.nnx.remat`.

    Raises:
      TypeError: a name is not a string.

    Source: Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost;
    Bulo et al. (2018), In-Place Activated BatchNorm.
    """
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"names must be strings of jax.ad_checkpoint.checkpoint_name; "
                f"got {name!r}. Call it to create a policy: policy=policy()."
            )
    kept = (INPUT, STATISTICS) if inputs else (STATISTICS,)
    chosen: Callable[..., bool] = jax.checkpoint_policies.save_only_these_names(
        *kept, *names
    )
    return chosen
