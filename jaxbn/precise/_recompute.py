"""Merges the moments of a model's layers over many batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxbn.nnx
from jaxbn._call import advance_streams, check_nnx_options, linen_options
from jaxbn._call_moments import nested
from jaxbn._convert_to_collect import CollectingLinen, collecting_nnx
from jaxbn._model_call import ModelCall, make_model_call
from jaxbn._passes import Moments
from jaxbn.precise._moments_sum import MomentsSum


class Precise(NamedTuple):
    """Result of `recompute`.

    Attributes:
      stats: tree of Moments over all batches, float64 numpy arrays.
      batches: number of batches read.
      error: estimated relative standard error of the worst channel; inf if it
        cannot be estimated.
      converged: whether error is below the tolerance.
    """

    stats: Any
    batches: int
    error: float
    converged: bool


def recompute(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    *,
    call: ModelCall | None = None,
    rngs: Any = None,
    mutable: Collection[str] = (),
    tolerance: float | None = None,
    min_batches: int = 10,
    epsilon: float = 1e-5,
    progress: bool = False,
) -> Precise:
    """Merges the Moments of all batches, weighted by their counts.

    A moving average covers about 1 / (1 - decay) batches, seen by weights that
    have changed since. This function covers any number of batches with fixed
    weights: after training, after weight averaging (SWA, EMA), or for new data.
    Since the input of a layer depends on the batches that earlier layers are
    normalized with, use training batches.

    The error is the standard error of a mean of independent batches: with
    weights w_i, SE^2 = k / (k - 1) sum w_i^2 (m_i - m)^2 / (sum w_i)^2, of
    means in units of the standard deviation and of variances relative to the
    variance, the maximum over channels and layers. Ordered batches, such as
    class by class, are not independent: shuffle them, or set no tolerance.

    Args:
      model: a flax.linen or flax.nnx module with layers of flax or jaxbn, or a
        function (variables, batch) -> tree of Moments, such as one that calls
        `jaxbn.linen.batch_moments` in shard_map. It is jitted.
      variables: variables of a linen model, None for nnx, or the argument of
        the function.
      batches: batches of any size; on several devices, sharded arrays.
      call: (model, batch, train) -> output, called with train=True. None
        passes the batch to the model, and the mode to the argument or field
        that takes it, such as train or deterministic. A linen model is bound,
        as for `method` in flax.
      rngs: for linen, a key or a dict of keys; the batch number is folded in.
        None creates a key for every stream.
      mutable: for linen, names of collections that the call creates.
      tolerance: stops once the error is below it; None reads all batches.
      min_batches: minimum number of batches to read, at least 2.
      epsilon: epsilon of the layers, unit of x squared; added to the variance
        that errors are relative to.
      progress: shows a progress bar.

    Returns:
      Precise; put its stats into a model with `with_statistics` or
      `jaxbn.nnx.set_statistics`.

    Raises:
      ValueError: there is no batch; the function returns something else;
        statistics of a batch are not finite; no layer is in training mode; or
        the model cannot be called without `call`.

    Source: Wu and Johnson (2021), Rethinking "Batch" in BatchNorm, section 3.
    """
    if min_batches < 2:
        raise ValueError(f"min_batches must be at least 2; got {min_batches}.")
    function, variables = _as_moments_fn(model, variables, call, rngs, mutable)
    compiled = jax.jit(function)
    sums: list[MomentsSum] = []
    read, error = 0, np.inf
    treedef = None
    for batch in _with_progress_bar(batches, progress):
        parts = jax.device_get(compiled(variables, batch, np.int32(read)))
        found, treedef = jax.tree.flatten(parts, is_leaf=_is_moments)
        if not found or not all(map(_is_moments, found)):
            raise ValueError(
                "The function must return a tree of jaxbn.Moments; got "
                f"{jax.tree.map(type, found)}."
            )
        sums = sums or [MomentsSum() for _ in found]
        for total, part in zip(sums, found):
            if not (
                np.isfinite(part.mean).all() and np.isfinite(part.m2).all()
            ):
                raise ValueError(
                    f"Statistics of batch {read} (from 0) are not finite; "
                    "check it for NaN or inf. Nothing was changed."
                )
            total.add(part)
        read += 1
        if read > 1:
            error = max(total.error(epsilon) for total in sums)
        if tolerance is not None and read >= min_batches and error < tolerance:
            break
    if not read:
        raise ValueError(
            "batches is empty. An iterator can be read only once: create a new "
            "one."
        )
    stats = jax.tree.unflatten(treedef, [total.moments for total in sums])
    converged = tolerance is not None and error < tolerance
    return Precise(stats, read, float(error), converged)


def _as_moments_fn(
    model: Any,
    variables: Any,
    call: ModelCall | None,
    rngs: Any,
    mutable: Collection[str],
) -> tuple[Callable[[Any, Any, Any], Any], Any]:
    """Returns (variables, batch, batch number) -> Moments, and variables."""
    if not isinstance(model, (nn.Module, nnx.Module)):
        if call is not None or rngs is not None or mutable:
            raise ValueError(
                "call, rngs and mutable are only for flax models; got a "
                f"{type(model).__name__}."
            )
        return lambda variables, batch, _: model(variables, batch), variables
    run = make_model_call(model, call)
    if isinstance(model, nn.Module):
        linen = CollectingLinen(model)

        def of_linen(variables: Any, batch: Any, number: Any) -> Any:
            options = linen_options(variables, rngs, mutable, number=number)
            _, found, _ = linen.collect(variables, batch, method=run, **options)
            return nested({path: part.values for path, part in found.items()})

        return of_linen, variables
    check_nnx_options(rngs, mutable)
    graphdef, state = nnx.split(collecting_nnx(model))

    def of_nnx(state: Any, batch: Any, number: Any) -> Any:
        copy: Any = nnx.merge(graphdef, state)
        advance_streams(copy, number)
        copy.train()
        return jaxbn.nnx.batch_moments(copy, batch, call=run)

    return of_nnx, state


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)


def _with_progress_bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.progress import track  # comes with flax

    return track(batches, description="statistics")
