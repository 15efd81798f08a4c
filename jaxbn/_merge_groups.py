"""Merges the moments of groups into those of all examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbn._affine import Spec
from jaxbn._arithmetic import widen
from jaxbn._collectives import Devices
from jaxbn._moments import merge_parts
from jaxbn._passes import Centered, Moments


def merge_groups(
    spec: Spec,
    stats: Centered,
    all_devices: Devices,
    shift: jax.Array | None,
) -> Moments:
    """Merges the moments of all groups into those of all examples."""
    chunks, num_ids = spec.reduction.chunks, spec.reduction.num_ids
    ghost = spec.reduction.chunks != 1
    if not ghost and spec.devices == all_devices:
        return stats.moments
    if num_ids is not None:
        parts = Centered(*(a.reshape(chunks, -1, *a.shape[1:]) for a in stats))
    elif spec.reduction.has_rows:
        parts = stats
    else:
        parts = Centered(*(a[None] for a in stats))
    start = jnp.zeros((), parts.shift.dtype) if shift is None else widen(shift)
    start = jnp.broadcast_to(
        jax.lax.stop_gradient(start), parts.shift.shape[1:]
    )
    copies = spec.devices.size
    if spec.devices.groups is None:
        # The moments are equal along axes that were reduced already.
        all_devices, copies = all_devices.without(spec.devices.names), 1
    total = merge_parts(parts, start, devices=all_devices).moments
    count = total.count
    if num_ids is None and count.size == 1:
        count = count.reshape(())
    # All members of a group have counted the same moments.
    return Moments(count / copies, total.mean, total.m2 / copies)
