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
    """`jax.value_and_grad` of a loss over a batch, in microbatches.

    The last argument of loss is the batch: a tree of arrays with the examples
    on axis 0, which may include arrays of random keys. Microbatch i of k
    consists of the examples i, i + k, i + 2k, ..., so a batch that is sharded
    over devices stays in place. All other arguments are the same for every
    microbatch.

    exact=True: the microbatches advance together from one normalization to the
    next, and share its statistics. Value, gradient and new running statistics
    are those of the whole batch, for any number of microbatches. This includes
    `normalize_over`, whose groups are consecutive examples of the batch. Layers
    need axis_name="micro", under shard_map ("data", "micro").

    exact=False: each microbatch is normalized with its own statistics, which is
    cheaper, but trains a different network. Layers need no axis_name, under
    shard_map "data"; groups of `normalize_over` consist of examples of one
    microbatch, which are not consecutive. If loss returns the `Moments` of the
    layers as aux, they are merged, exactly, into those of the whole batch, for
    a single update of the running statistics; see `update_batch_stats`.

    Value and gradient are means over the microbatches: if loss is a mean over
    examples, the mean over the batch. If a mask leaves microbatches with
    different counts, the mean of their means is not that of the batch. With
    exact=True, let loss return the mean over all microbatches, which is equal
    on each: jax.lax.psum(losses.sum(), "micro") / jax.lax.psum(count, "micro").

    Memory with exact=True: the input of each normalization is kept for the
    backward pass, for all microbatches; in residual networks also the sum of
    the branches, once every few blocks. Everything else exists for one
    microbatch at a time: outputs of layers, inputs of convolutions, and
    gradients of activations (those of one layer for all microbatches). Six
    convolutions of equal width took 0.49 of the memory of the whole batch with
    4 microbatches and 0.42 with 16; with exact=False, 0.24 and 0.07. Code in
    jax.checkpoint is recomputed, including its collectives: with three
    convolutions in each, memory was 0.37 and 0.34.

    Args:
      loss: (params, ..., batch) -> () array, or with has_aux (() array, aux).
        Over axis_name it may use psum, pmean, pmax, pmin, all_gather,
        psum_scatter and axis_index, but not in a while_loop, nor in a cond
        whose predicate differs between microbatches. A scan over layers with
        batch norm, such as nn.scan, is unrolled, which takes longer to compile.
        A random key is the same for all microbatches: fold in
        jax.lax.axis_index("micro"), or put a key for each example into the
        batch. Under shard_map with check_vma=True, pass arrays as arguments
        instead of closing over them.
      microbatches: k, a divisor of the number of examples (per device, under
        shard_map).
      axis_name: name of the axis of microbatches, for layers and loss, with
        exact=True.
      exact: whether microbatches share statistics.
      argnums: arguments to differentiate, counted from 0.
      has_aux: whether loss also returns aux.

    Returns:
      Function of the arguments of loss, for use under jax.jit, that returns
      (value, gradient), or with has_aux ((value, aux), gradient). An array of
      aux that is equal for all microbatches, such as new running statistics, is
      returned unchanged; `Moments` that differ are merged; any other array gets
      a new axis 0 for the microbatches, so that the output of example i + j k
      is aux[i, j].

    Raises:
      ValueError: microbatches does not divide the number of examples; a leaf of
        the batch has no examples, or a different number of them; argnums
        includes the batch; exact is True, but nothing in loss uses axis_name;
        axis_name is already bound; a collective cannot run in lockstep, or is
        in a while_loop; or an array is closed over.
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
    """Applies `jaxbn.update_running` to all layers of a model.

    Args:
      batch_stats: nested mappings, with mean and var (and steps, skipped) for
        each layer, as in flax, or `RunningStats` in their place.
      moments: a tree of the same structure, or a part of it, with `Moments` for
        each layer, or {"moments": Moments} as in flax's collection
        batch_moments. Other layers keep their statistics.
      decay, ddof, debias, skip_nonfinite: as in `jaxbn.update_running`; decay
        is flax's momentum.

    Returns:
      A tree with the structure and dtypes of batch_stats: what layers called on
      the whole batch would store. batch_stats is not changed.

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
