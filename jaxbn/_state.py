"""The state of a layer, and its rows for timesteps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._arithmetic import promoted, widen
from jaxbn._compat import match_type
from jaxbn._moments import merge
from jaxbn._passes import Moments
from jaxbn._running import RunningStats


class State(NamedTuple):
    """The variables of a layer that training updates."""

    running: RunningStats  # (C,), with ids (K, C), with timesteps (T, C)
    skipped: (
        jax.Array | None
    )  # () number of skipped batches, or None if not counted


def take_row(running: RunningStats, row: jax.Array | None) -> RunningStats:
    if row is None:
        return running
    own: RunningStats = jax.tree.map(lambda a: a[row], running)
    return own


def widened(running: RunningStats) -> RunningStats:
    return running._replace(mean=widen(running.mean), var=widen(running.var))


def as_stored(new: RunningStats, old: RunningStats) -> RunningStats:
    """Casts to the dtype of old if that was cast below float32.

    A loop must preserve the dtypes of its carry. A layer itself only creates
    state of at least float32.
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

    def put(rows: jax.Array, new: jax.Array) -> Any:
        rows, new = promoted(rows, new)
        return _set_row(rows, match_type(new, rows[row]), row)

    rows: RunningStats = jax.tree.map(put, running, new)
    return rows


def in_row(
    batch: Moments, running: RunningStats, row: jax.Array | None
) -> Moments:
    """Puts the moments of a timestep into a row of otherwise empty moments."""
    if row is None:
        return batch
    every = jnp.broadcast_to(batch.count, batch.mean.shape)
    length = len(running.mean)

    def put(own: jax.Array) -> Any:
        empty = jnp.broadcast_to(jnp.zeros_like(own), (length, *own.shape))
        return _set_row(empty, own, row)

    rows: Moments = jax.tree.map(put, batch._replace(count=every))
    return rows


def _set_row(rows: jax.Array, value: jax.Array, row: jax.Array) -> Any:
    # Not rows.at[row].set, which needs value to be unsharded.
    return jax.lax.dynamic_update_index_in_dim(rows, value, row, 0)


def no_moments(running: RunningStats) -> Moments:
    """Returns empty moments for running statistics."""
    mean, var, _ = jax.tree.map(jnp.zeros_like, widened(running))
    return Moments(var, mean, var)


def record(old: Moments, batch: Moments) -> Moments:
    """Merges a batch into the moments of a layer, preserving shapes."""
    count = jnp.broadcast_to(batch.count, batch.mean.shape)
    return merge(old, batch._replace(count=count))
