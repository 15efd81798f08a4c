"""Value and gradient of a batch in microbatches, and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._batch_stats import map_layers, replace_entries
from jaxbn._compat import types_say_varying, varying_axes
from jaxbn._passes import Moments
from jaxbn._running import RunningStats, is_finite, update_running
from jaxbn._state import as_stored
from jaxbn.accumulate._lockstep import check_unbound
from jaxbn.accumulate._loop import Inputs, Stack
from jaxbn.accumulate._microbatches import (
    gradient_like,
    gradient_of_one,
    is_array,
    means,
    split,
    vary_some,
)


def value_and_grad(
    loss: Callable[..., Any],
    *,
    microbatches: int,
    axis_name: Hashable = "micro",
    exact: bool = True,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """`jax.value_and_grad` of loss over a batch, in microbatches.

    The last argument of loss is the batch, a tree of arrays with the examples
    on axis 0; arrays of random keys may be among them. Microbatch i of k holds
    the examples i, i + k, i + 2k, ..., so that a batch which is sharded over
    devices stays where it is. All other arguments are the same for every
    microbatch.

    exact=True: the microbatches advance together from one normalization to the
    next and share its statistics. Value, gradient and new running statistics
    are those of the whole batch, for any number of microbatches; so they are
    with `normalize_over`, whose groups are runs of neighbours in the batch.
    Layers need axis_name="micro", under shard_map ("data", "micro").

    exact=False: every microbatch is normalized with its own statistics, which
    is cheaper, and another network. Layers need no axis, under shard_map
    "data"; groups of `normalize_over` are taken from the examples of a
    microbatch, which are no neighbours. Let loss return the `Moments` of the
    layers as aux: they come back merged, exactly those of the whole batch, for
    one update of the running statistics; see `update_batch_stats`.

    Value and gradient are means over the microbatches: of a loss that is a
    mean over examples, the mean over the batch. Where a mask leaves
    microbatches with unlike counts, the mean of their means is another number.
    With exact=True write the mean over all of them, which is any microbatch's:
    jax.lax.psum(losses.sum(), "micro") / jax.lax.psum(count, "micro").

    Memory, exact: the input of every normalization is kept for the backward
    pass for all microbatches, and in residual networks every few blocks their
    sum. All else exists for one microbatch at a time: what layers return,
    inputs of convolutions, gradients of activations (of one layer for all).
    Six convolutions of one width with 4 microbatches took 0.49 of the memory
    of the whole batch, with 16 0.42, and exact=False 0.24 and 0.07. Code in
    jax.checkpoint is computed again, with its collectives, as it asks for:
    three convolutions in each took 0.37 and 0.34.

    Args:
      loss: (params, ..., batch) -> () array, or with has_aux (() array, aux).
        Over axis_name it may use psum, pmean, pmax, pmin, all_gather,
        psum_scatter and axis_index, but not inside while_loop, nor in a cond
        that microbatches decide for themselves. A scan of layers with batch
        norm, such as nn.scan, is written out, to be compiled step by step.
        A random key is the same for all microbatches: fold
        jax.lax.axis_index("micro") into it, or give every example its own in
        the batch. Under shard_map with check_vma=True arrays have to be
        arguments, not closed over.
      microbatches: k, a divisor of the number of examples (of a device under
        shard_map).
      axis_name: what layers and loss call the microbatches if exact.
      exact: whether microbatches share statistics.
      argnums: arguments to differentiate, counted from 0.
      has_aux: whether loss returns aux too.

    Returns:
      Function of the arguments of loss, to be used under jax.jit, that returns
      (value, gradient), with has_aux ((value, aux), gradient). An array of aux
      that microbatches share, such as new running statistics, comes back as it
      is; `Moments` that they do not share are merged; any other array gets a
      new axis 0 for the microbatches, so that the output of example i + j k is
      aux[i, j].

    Raises:
      ValueError: microbatches does not divide the examples; a leaf of the batch
        has no examples, or another number of them; argnums names the batch;
        exact and nothing in loss uses axis_name; axis_name is bound already; a
        collective that does not run in lockstep, or inside while_loop; an array
        that is closed over.
    """
    nums = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def step(*args: Any) -> Any:
        *shared, batch = args
        if not all(0 <= n < len(shared) for n in nums):
            raise ValueError(
                f"argnums={argnums} must count from 0 and name arguments "
                f"before the last of {len(args)}, which is the batch."
            )
        if exact:
            check_unbound(axis_name)
        for n in nums:
            shared[n] = jax.tree.map(jnp.asarray, shared[n])
        rows, batch_tree = jax.tree.flatten(split(batch, microbatches))
        # Devices sum their gradients in the end, not in every microbatch.
        over = set().union(*map(varying_axes, rows))
        leaves, tree = jax.tree.flatten(vary_some(shared, nums, over))
        traced = [leaf for leaf in leaves if is_array(leaf)]

        def of_one(*arrays: jax.Array) -> Any:
            left = iter(arrays)
            local = jax.tree.unflatten(
                tree, [next(left) if is_array(x) else x for x in leaves]
            )
            micro = jax.tree.unflatten(batch_tree, left)
            axis = {axis_name} if exact and types_say_varying() else set()
            both = gradient_of_one(loss, argnums, has_aux, axis)
            return both(*vary_some(local, nums, axis), micro)

        inputs = Inputs(
            [*traced, *(Stack(row, 1) for row in rows)],
            microbatches,
            axis_name if exact else None,
        )
        (value, grads), aux = means(of_one, inputs)
        like = (
            shared[argnums]
            if isinstance(argnums, int)
            else tuple(shared[n] for n in nums)
        )
        grads = jax.tree.map(gradient_like, grads, like)
        return ((value, aux) if has_aux else value), grads

    return step


def update_batch_stats(
    batch_stats: Any,
    moments: Any,
    *,
    decay: float | jax.Array | None,
    ddof: int = 0,
    debias: bool = False,
    skip_nonfinite: bool = False,
) -> Any:
    """`jaxbn.update_running` for all layers of a model.

    Args:
      batch_stats: nested mappings, with mean and var (and steps, skipped) of a
        layer innermost, as flax's are; or `RunningStats` in their place.
      moments: the same tree, or a part of it, with `Moments` in place of the
        layers, or {"moments": Moments} as in flax's collection batch_moments.
        Layers that are not in it keep their statistics.
      decay: see `jaxbn.update_running`; flax's momentum.
      ddof: likewise.
      debias: likewise.
      skip_nonfinite: likewise.

    Returns:
      The tree of batch_stats, each array in its dtype: what layers that saw
      the whole batch would store. batch_stats itself stays.

    Raises:
      ValueError: moments is empty, or its structure or shapes do not match
        those of batch_stats.
    """
    if not jax.tree.leaves(moments):
        raise ValueError(
            f"moments holds none; got {moments}. Layers hand them out where "
            "mutable names the collection 'batch_moments'. nn.vmap and nn.scan "
            "pass on what their variable_axes name: add 'batch_moments' to it."
        )

    def update(layer: Mapping[str, Any], batch: Moments) -> dict[str, Any]:
        old = RunningStats(layer["mean"], layer["var"], layer.get("steps"))
        new = update_running(
            old,
            batch,
            decay=decay,
            ddof=ddof,
            debias=debias,
            skip_nonfinite=skip_nonfinite,
        )
        changed = as_stored(new, old)._asdict()
        if "skipped" in layer:
            skips = jnp.where(is_finite(batch), 0, 1)
            changed["skipped"] = layer["skipped"] + skips
        return {name: changed[name] for name in changed if name in layer}

    changed = map_layers(
        update, batch_stats, moments, names=("batch_stats", "moments")
    )
    return replace_entries(batch_stats, changed)
