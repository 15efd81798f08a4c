"""The variables that training moves, and rows of them for timesteps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._arithmetic import widen
from jaxbn._moments import merge
from jaxbn._passes import Moments
from jaxbn._running import RunningStats


class State(NamedTuple):
    """The variables that training moves."""

    running: RunningStats  # (C,), with ids (K, C), with timesteps (T, C)
    skipped: jax.Array | None  # () batches left out; None: nobody counts


def take_row(running: RunningStats, row: jax.Array | None) -> RunningStats:
    if row is None:
        return running
    own: RunningStats = jax.tree.map(lambda a: a[row], running)
    return own


def widened(running: RunningStats) -> RunningStats:
    return running._replace(mean=widen(running.mean), var=widen(running.var))


def as_stored(new: RunningStats, old: RunningStats) -> RunningStats:
    """Rounds to the dtype of old where its owner has cast it below float32.

    A loop that carries the state keeps its dtypes. The layer makes no state
    that narrow itself.
    """

    def stored(new: jax.Array, old: jax.Array) -> jax.Array:
        narrow = widen(old).dtype != old.dtype and not jnp.iscomplexobj(new)
        return new.astype(old.dtype) if narrow else new

    return new._replace(
        mean=stored(new.mean, old.mean), var=stored(new.var, old.var)
    )


def put_row(
    running: RunningStats, new: RunningStats, row: jax.Array | None
) -> RunningStats:
    if row is None:
        return new

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        rows = rows.astype(np.promote_types(rows.dtype, new.dtype))
        return rows.at[row].set(new)

    rows: RunningStats = jax.tree.map(put, running, new)
    return rows


def in_row(
    batch: Moments, running: RunningStats, row: jax.Array | None
) -> Moments:
    """The moments of a timestep among those of all, where the rest is empty."""
    if row is None:
        return batch
    every = jnp.broadcast_to(batch.count, batch.mean.shape)
    rows: Moments = jax.tree.map(
        lambda a: (
            jnp.zeros((len(running.mean), *a.shape), a.dtype).at[row].set(a)
        ),
        batch._replace(count=every),
    )
    return rows


def no_moments(running: RunningStats) -> Moments:
    """Returns the moments of nothing, an entry for each running statistic."""
    mean, var, _ = jax.tree.map(jnp.zeros_like, widened(running))
    return Moments(var, mean, var)


def record(old: Moments, batch: Moments) -> Moments:
    """Adds a batch to the moments a layer hands out, whose shapes stay."""
    count = jnp.broadcast_to(batch.count, batch.mean.shape)
    return merge(old, batch._replace(count=count))
