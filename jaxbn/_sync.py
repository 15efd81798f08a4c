"""The same Moments on every device: count-weighted sums over mesh axes."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxbn._checks import AxisName, bound_axes
from jaxbn._moments import (
    Local,
    Moments,
    apart,
    difference,
    merge_stacked,
)
from jaxbn._scope import Groups, Partition
from jaxbn._twofold import on_grid, rounded, two_product, two_sum

Names = tuple[Hashable, ...]


# Sums weigh by counts in this unit, so that they stay in range where the
# values do. A power of two: no digit changes.
_UNIT = 2.0**-31


def sync(
    local: Moments,
    *,
    axis_name: AxisName,
    pivot: jax.Array | None = None,
) -> Moments:
    """Merges the moments of all devices along named axes.

    With d_i = mean_i - pivot and n = sum n_i, one all-reduce of 2C+1 floats
    gives mean = pivot + sum n_i d_i / n and
    m2 = sum (m2_i + n_i d_i^2) - (sum n_i d_i)^2 / n. Each m2_i is about its
    own mean, so only the spread between devices can cancel. A pivot far from
    the mean costs about 5e-7 ((mean - pivot) / std)^2 of the variance, and that
    much is added, so that it is never underestimated.

    Without a pivot the result is exact for any mean. The sums about zero
    travel in two parts each, 4C+2 floats in one all-reduce: a leading part on
    a grid so coarse that it is added without rounding, and the rest. Grids
    agree between devices because means do; the largest count, which scales
    them, is found in a reduction before it (`batch_norm` knows it).

    Args:
      local: moments of this device's part; its count may be 0.
      axis_name: name, or tuple of names, of the mapped axes to reduce over.
        Not bound and no named axis in scope: local is already global.
      pivot: (C,) or None; a value near the mean, the same on all devices, for
        example the running mean. It changes rounding and bytes, never the
        result.

    Returns:
      Moments of all parts together, equal on all devices.

    Raises:
      ValueError: axis_name is not bound though another named axis is.

    Source: Chan, Golub, LeVeque (1979), Updating Formulae; the grid after
    Demmel and Nguyen (2013), Fast Reproducible Floating-Point Summation.
    """
    count, mean, m2 = local
    names = bound_axes(axis_name)
    parts = Local(count, mean, jnp.zeros_like(mean), m2)
    largest = None
    if names and pivot is None:
        largest = jax.lax.pmax(jnp.max(count), names)
    return sync_local(parts, names, None, pivot, largest).moments


def sync_local(
    local: Local,
    names: Names,
    groups: Groups,
    pivot: jax.Array | None,
    largest: float | jax.Array | None,
) -> Local:
    """`sync` behind its checks, over all devices or inside groups.

    largest is a bound on the counts that all devices know; only needed where
    there is neither pivot nor groups.
    """
    if not names:
        return local
    is_complex = jnp.iscomplexobj(local.shift)
    if is_complex:
        local = _as_real(local)
    if groups is not None:
        total = merge_stacked(_gather(local, names, groups))
    elif pivot is None:
        bound = cast("float | jax.Array", largest)
        total = _sync_exactly(local, names, bound)
    else:
        if is_complex:
            pivot = jnp.stack([pivot.real, pivot.imag])
        total = _sync_about(local, names, jax.lax.stop_gradient(pivot))
    # The larger part first, so that x - shift is as small as x - mean.
    shift, offset = two_sum(total.shift, total.offset)
    total = total._replace(shift=shift, offset=offset)
    return _as_complex(total) if is_complex else total


def _sync_about(local: Local, names: Names, pivot: jax.Array) -> Local:
    count, shift, offset, m2 = local
    pivot = pivot.astype(shift.dtype)
    pivot = jnp.where(jnp.isfinite(pivot), pivot, 0)
    d = jnp.where(count > 0, shift - pivot + offset, 0)
    n, s1, s2 = all_sum(
        (count, count * _UNIT * d, m2 + count * jnp.square(d)), names
    )
    mean = rounded(s1 / jnp.maximum(n * _UNIT, _UNIT))
    between = n * jnp.square(mean)
    m2 = difference(s2, between) + 4 * jnp.finfo(m2.dtype).eps * between
    return Local(n, jnp.where(n > 0, pivot, 0), mean, m2)


def _sync_exactly(
    local: Local, names: Names, largest: float | jax.Array
) -> Local:
    """Sums n, n mean and n mean^2 + m2 in two floats each.

    A capital is the leading float of a pair, the small letter the rest.
    """
    n = local.count * _UNIT
    dtype = local.m2.dtype
    info = jnp.finfo(dtype)
    bits = info.nmant - (jax.lax.axis_size(names) - 1).bit_length()
    mean, tail = two_sum(local.shift, local.offset)
    mean, tail = jnp.where(n > 0, mean, 0), jnp.where(n > 0, tail, 0)
    # Beyond this squares overflow: the variance is then given up as inf.
    huge = jnp.abs(mean) > 2.0 ** (info.maxexp // 2 - 14)
    base = jnp.where(huge, 0, mean)

    most = jnp.asarray(largest, dtype) * _UNIT
    s1, s1_low = two_product(n, mean)
    s1, s1_low = on_grid(s1, s1_low + n * tail, most * jnp.abs(mean), bits)
    p, p_low = two_product(n, base)
    s2, s2_low = two_product(p, base)
    s2_low = s2_low + p_low * base + n * tail * (2 * base + tail)
    s2, s2_low = on_grid(s2, s2_low, most * jnp.square(base), bits)
    rest = jnp.where(huge, jnp.inf, s2_low + local.m2 * _UNIT)
    # Together counts may need more digits than one float has.
    high = rounded(local.count, info.nmant // 2)

    high, low, s1, s1_low, s2, rest = all_sum(
        (high, local.count - high, s1, s1_low, s2, rest), names
    )
    count, count_low = two_sum(high, low)
    n, n_low = count * _UNIT, count_low * _UNIT
    total, total_low = two_sum(s1, s1_low)
    mean = rounded(total / jnp.maximum(n, _UNIT))
    product, product_low = two_product(mean, n)
    product_low = product_low + mean * n_low
    tail = ((total - product) - product_low + total_low) / jnp.maximum(n, _UNIT)
    square, square_low = two_product(product, mean)
    square_low = square_low + product_low * mean + 2 * product * tail
    m2 = jnp.maximum((s2 - square) + (rest - square_low), 0)
    m2 = jnp.where(jnp.isinf(rest), rest, m2) / _UNIT
    # One program writes all three; else each of their readers would be
    # compiled with all of the above inside.
    mean, tail, m2 = apart(jnp.stack([mean, tail, m2]))
    return Local(count, mean, tail, m2)


def all_sum(tree: Any, names: Names, groups: Groups = None) -> Any:
    """Sums every leaf over the named axes, or inside groups, in one go."""
    if not names:
        return tree
    flat, unravel = _ravel(tree)
    if groups is None:
        return unravel(jax.lax.psum(flat, names))
    return unravel(_gather_flat(flat, names, groups).sum(0))


def _gather(tree: Any, names: Names, groups: Partition) -> Any:
    """Stacks the leaves of the devices of a group along a new first axis."""
    flat, unravel = _ravel(tree)
    return jax.vmap(unravel)(_gather_flat(flat, names, groups))


def _gather_flat(flat: jax.Array, names: Names, groups: Partition) -> jax.Array:
    everyone: jax.Array
    # psum takes no groups under shard_map, and under vmap nothing does.
    if set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        everyone = jax.lax.all_gather(flat, names, axis_index_groups=groups)
        return everyone
    members = {i: group for group in groups for i in group}
    own = jnp.array([members[i] for i in range(len(members))])
    everyone = jax.lax.all_gather(flat, names)
    return everyone[own[jax.lax.axis_index(names)]]


def _ravel(tree: Any) -> tuple[jax.Array, Any]:
    """Returns all leaves as one real vector, and its inverse."""
    leaves, treedef = jax.tree.flatten(tree)
    parts: list[jax.Array] = []
    for leaf in leaves:
        pair = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
        parts.extend(part.reshape(-1) for part in pair)
    lengths = [part.size for part in parts]

    def unravel(flat: jax.Array) -> Any:
        pieces = iter(jnp.split(flat, list(itertools.accumulate(lengths))[:-1]))
        out = []
        for leaf in leaves:
            piece = next(pieces)
            if jnp.iscomplexobj(leaf):
                piece = jax.lax.complex(piece, next(pieces))
            out.append(piece.reshape(leaf.shape))
        return jax.tree.unflatten(treedef, out)

    return jnp.concatenate(parts), unravel


def _as_real(local: Local) -> Local:
    """Real and imaginary parts as features of their own."""

    def pair(z: jax.Array) -> jax.Array:
        return jnp.stack([z.real, z.imag])

    m2 = jnp.stack([local.m2, jnp.zeros_like(local.m2)])
    return Local(local.count, pair(local.shift), pair(local.offset), m2)


def _as_complex(local: Local) -> Local:
    shift, offset = (
        jax.lax.complex(z[0], z[1]) for z in (local.shift, local.offset)
    )
    return Local(local.count, shift, offset, local.m2.sum(0))


def vary_like(tree: Any, x: jax.Array) -> Any:
    """Marks statistics as varying over the mesh axes that x varies over.

    Under shard_map with check_vma=True the transpose of this mark is the one
    psum of the backward pass. Left implicit, every use would get its own.
    Everywhere else it does nothing.
    """
    flat, unravel = _ravel(tree)
    axes = _varying(x) - _varying(flat)
    if not axes:
        return tree
    return unravel(jax.lax.pcast(flat, tuple(axes), to="varying"))


def _varying(x: jax.Array) -> frozenset[Hashable]:
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", aval)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))
