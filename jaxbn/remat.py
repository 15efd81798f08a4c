"""What the backward pass keeps of a network with batch norm.

Convolution outputs (the inputs of batch norm) and statistics are kept; the
normalized arrays and what follows them up to the next convolution are computed
again: `jax.checkpoint(block, policy=jaxbn.remat.policy())`, in flax
`nn.remat(Block, policy=...)` and `nnx.remat(block, policy=...)`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

__all__ = ["INPUT", "STATISTICS", "policy"]

# Names of `jax.ad_checkpoint.checkpoint_name`, for policies of one's own.

#: What a layer normalizes, in its own dtype.
INPUT = "jaxbn_input"
#: Its synchronized moments, one value a feature.
STATISTICS = "jaxbn_statistics"


def policy(*names: str, inputs: bool = True) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint`: keep the inputs of batch norm.

    Kept are the arguments of the function under `jax.checkpoint` and, of each
    layer in it, the input in its own dtype and the statistics. So no
    convolution is repeated and no statistic, which would be another
    all-reduce: the compiled program has as many collectives as without. Between
    two convolutions remain batch norm, activation and sum to be computed again.

    A block of convolutions c1, c2, c3 then keeps its input, c1, c2 and c3. Of
    several blocks in one function the first input alone is kept: half a
    ResNet's bytes are its convolution outputs.

    Args:
      *names: further names of `jax.ad_checkpoint.checkpoint_name` to keep.
      inputs: False keeps the statistics alone: the least memory without
        repeated collectives, for another forward pass through the
        convolutions.

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
                f"got {name!r}. A policy is made first: policy=policy()."
            )
    kept = (INPUT, STATISTICS) if inputs else (STATISTICS,)
    chosen: Callable[..., bool] = jax.checkpoint_policies.save_only_these_names(
        *kept, *names
    )
    return chosen
