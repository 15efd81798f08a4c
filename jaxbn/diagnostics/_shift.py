"""Internal covariate shift: change of gradients by earlier layers' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import widen
from jaxbn.diagnostics._model import Loss, map_rows, scalar_loss
from jaxbn.diagnostics._trees import Path, check_same_structure, find_leaves


class CovariateShift(NamedTuple):
    """Change of a layer's gradient by the update of earlier layers.

    For the first layer 0, 1 and 0, up to rounding.

    Attributes:
      l2: (L,) ||G' - G||.
      cosine: (L,) between G' and G.
      relative: (L,) ||G' - G|| / ||G||.
    """

    l2: jax.Array
    cosine: jax.Array
    relative: jax.Array


def internal_covariate_shift(
    loss: Loss,
    params: Any,
    new_params: Any,
    batch_stats: Any,
    batch: Any,
    *,
    order: Sequence[Path],
    unroll: bool = False,
) -> CovariateShift:
    """Measures how updates of earlier layers change a layer's gradient.

    With parameters W before and W' after a step, on the same batch:
    G_i = dL/dW_i at (W_1, ..., W_L) and
    G'_i = dL/dW_i at (W'_1, ..., W'_{i-1}, W_i, ..., W_L).

    Takes one backward pass for G and L for G'.

    Args:
      loss: as in `gradient_line`.
      params: tree of floating arrays, before the step.
      new_params: the same tree, after it.
      batch_stats, batch: passed to loss.
      order: the layers 1 to L, first to last: keys of params, such as
        "Dense_0", or paths, such as "block/Dense_0" or ("block", "Dense_0").
        A layer has all arrays below its path. Other arrays keep their values
        from before the step.
      unroll: as in `gradient_line`.

    Returns:
      CovariateShift.

    Raises:
      ValueError: order is empty, has a path that is not in params, or an array
        twice; new_params has another structure; or loss returns something else.

    Source: Santurkar et al. (2018), How Does Batch Normalization Help
    Optimization?, definition 2.1.
    """
    check_same_structure(new_params, params, what="new_params", than="params")
    layer_of = _layers(params, order)
    old, treedef = jax.tree.flatten(params)
    new = jax.tree.leaves(new_params)
    slope = jax.grad(scalar_loss(loss, batch_stats, batch))
    before = jax.tree.leaves(slope(params))

    def products(there: list[jax.Array]) -> tuple[jax.Array, ...]:
        """Squared change, inner product and squared norm, (L,) each."""
        sums: list[list[Any]] = [[0.0] * len(order) for _ in range(3)]
        for leaf, layer in layer_of.items():
            a, b = widen(there[leaf]), widen(before[leaf])
            sums[0][layer] += jnp.square(a - b).sum()
            sums[1][layer] += (a * b).sum()
            sums[2][layer] += jnp.square(a).sum()
        return tuple(map(jnp.stack, sums))

    def probe(layer: jax.Array) -> tuple[jax.Array, ...]:
        mixed = [
            jnp.where(layer_of[i] < layer, b, a) if i in layer_of else a
            for i, (a, b) in enumerate(zip(old, new))
        ]
        there = jax.tree.leaves(slope(jax.tree.unflatten(treedef, mixed)))
        return tuple(values[layer] for values in products(there))

    change, inner, squared = map_rows(
        probe, jnp.arange(len(order)), unroll=unroll
    )
    length = jnp.sqrt(products(before)[2])
    l2 = jnp.sqrt(change)
    return CovariateShift(l2, inner / (jnp.sqrt(squared) * length), l2 / length)


def _layers(params: Any, order: Sequence[Path]) -> dict[int, int]:
    """Maps leaf indices to layer indices."""
    if isinstance(order, str) or not len(order):
        raise ValueError(
            "order must list the layers, first to last, such as "
            f"('Dense_0', 'Dense_1'); got {order!r}."
        )
    layer_of: dict[int, int] = {}
    for layer, path in enumerate(order):
        for leaf in find_leaves(params, path, what="params"):
            if leaf in layer_of:
                raise ValueError(
                    f"{path!r} and {order[layer_of[leaf]]!r} of order are the "
                    "same array; each belongs to one layer."
                )
            layer_of[leaf] = layer
    return layer_of
