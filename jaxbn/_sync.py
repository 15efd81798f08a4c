"""The same Moments on every device: count-weighted sums over mesh axes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxbn._checks import AxisName, bound_axes
from jaxbn._moments import Moments

Groups = Sequence[Sequence[int]] | None


def sync(
    local: Moments,
    *,
    axis_name: AxisName,
    axis_index_groups: Groups = None,
    pivot: jax.Array | None = None,
) -> Moments:
    """Merges the moments of all devices along named axes, exactly.

    With p a value near the mean that every device has, d_i = mean_i - p and
    n = sum n_i, one reduction of 2C+1 floats gives
    mean = p + sum n_i d_i / n and
    m2 = sum (m2_i + n_i d_i^2) - (sum n_i d_i)^2 / n.
    Each m2_i is about its own mean, so only the spread between devices can
    cancel. A pivot far from the mean costs about 1e-7 ((mean - p) / std)^2 of
    the variance, and that much is added, so that it is never underestimated.
    Without a pivot a second reduction takes the deviations from the global
    mean, which is exact for any input.

    Args:
      local: moments of this device's part; its count may be 0.
      axis_name: name, or tuple of names, of the mapped axes to reduce over.
        Not bound and no named axis in scope: local is already global.
      axis_index_groups: as in `jax.lax.psum`, where JAX supports it.
      pivot: (C,) or None; the same on all devices, for example the running
        mean. It changes rounding, never the result.

    Returns:
      Moments of all parts together, equal on all devices.

    Raises:
      ValueError: axis_name is not bound though another named axis is.

    Source: Chan, Golub, LeVeque (1979), Updating Formulae.
    """
    names = bound_axes(axis_name)
    if not names:
        return local

    def total(tree: Any) -> Any:
        return all_sum(tree, names, axis_index_groups)

    count, mean, m2 = local
    if pivot is None:
        n, shift = total((count, count * mean))
        shift = shift / jnp.maximum(n, 1)
    else:
        shift = jax.lax.stop_gradient(pivot).astype(mean.dtype)
        shift = jnp.where(jnp.isfinite(shift), shift, 0)
    offset = jnp.where(count > 0, mean - shift, 0)
    n, s1, s2 = total((count, count * offset, m2 + count * offset * offset))
    mean_offset = s1 / jnp.maximum(n, 1)
    between = mean_offset * s1
    slack = 0 if pivot is None else 4 * jnp.finfo(m2.dtype).eps
    m2 = jnp.maximum(s2 - between, 0) + slack * between
    return Moments(n, jnp.where(n > 0, shift + mean_offset, 0), m2)


def all_sum(
    tree: Any, names: tuple[Hashable, ...], groups: Groups = None
) -> Any:
    """Sums every leaf over the named axes in a single all-reduce."""
    if not names:
        return tree
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.psum(flat, names, axis_index_groups=groups))


def vary_like(statistic: jax.Array, x: jax.Array) -> jax.Array:
    """Marks a statistic as varying over the mesh axes that x varies over.

    Under shard_map with check_vma=True the transpose of this mark is the one
    psum of the backward pass. Left implicit, every use would get its own.
    Everywhere else it does nothing.
    """
    axes = _varying(x) - _varying(statistic)
    if not axes:
        return statistic
    return jax.lax.pcast(statistic, tuple(axes), to="varying")


def _varying(x: jax.Array) -> frozenset[Hashable]:
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", aval)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))
