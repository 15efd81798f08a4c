"""Shuffles examples across devices and back, with one all-to-all."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbn._axis_names import AxisName, bound_axes
from jaxbn._bitcast import from_reals, from_uint32, to_reals, to_uint32
from jaxbn._checks import describe
from jaxbn._compat import varying_axes

Names = tuple[Hashable, ...]


def shuffle(tree: Any, key: jax.Array, *, axis_name: AxisName) -> Any:
    """Moves every example to a random device and position.

    For contrastive learning: if each device normalizes its own examples, a
    query and its key must not share statistics, or the network can infer the
    matching pairs from them. Shuffle the inputs of the key encoder, and
    `unshuffle` its outputs.

    With n examples on each of D devices, every device sends n / D random
    examples to each device, including itself, and permutes what it receives. So
    an example is equally likely to move to any of the n D positions. Not all
    (n D)! permutations occur: two examples of different devices meet with
    probability 1 / D, two of the same device with (n / D - 1) / (n - 1),
    whereas in a uniform permutation both are (n - 1) / (n D - 1). If D does not
    divide n, blocks have ceil(n / D) slots, some of them empty; which pairs of
    devices exchange one more example is also random.

    Takes one all-to-all for the whole tree, in bits: a device receives
    D ceil(n / D) B bytes, about n B, for B bytes per example, each leaf padded
    to a multiple of four. Gathering the whole batch would take n D B.

    Derivatives are communicated likewise, transposes in reverse; tangents of
    several dtypes are cast to the widest.

    Args:
      tree: pytree of arrays of any dtype, (n, ...): images, labels, masks,
        typed keys.
      key: from `jax.random.key` or `jax.random.PRNGKey`, equal on all devices,
        and a new one each step. Together with n and D it determines the
        permutation.
      axis_name: name or tuple of names of the mapped axes of the batch. If not
        bound, the tree is the global batch, and leaves are permuted
        individually under the compiler's control. None permutes the examples of
        each device.

    Returns:
      The tree with permuted examples, bitwise equal.

    Raises:
      ValueError: a leaf is a scalar, leaves differ in length, key is not a
        single key or is known to differ between devices, or axis_name is not
        bound, but another mesh axis, or an axis of a similar name, is.

    Source: He et al. (2020), Momentum Contrast, section 3.3 (shuffling BN).
    """
    return _permute(tree, key, axis_name, back=False)


def unshuffle(tree: Any, key: jax.Array, *, axis_name: AxisName) -> Any:
    """Moves every example back: the inverse of `shuffle` with the same key.

    The tree may be another one with as many examples, such as the outputs of a
    model for the shuffled one. Takes one all-to-all.

    Args:
      tree: pytree of arrays of any dtype, (n, ...) each.
      key: the key that `shuffle` was given.
      axis_name: as in `shuffle`.

    Returns:
      The tree with examples in their original order.

    Raises:
      ValueError: as in `shuffle`.

    Source: He et al. (2020), Momentum Contrast, section 3.3 (shuffling BN).
    """
    return _permute(tree, key, axis_name, back=True)


def _permute(tree: Any, key: jax.Array, axis_name: AxisName, back: bool) -> Any:
    key = _check_key(key)
    if back:
        # The key of shuffle, on purpose: not an error for jax_debug_key_reuse.
        key = jax.random.clone(key)
    leaves, treedef = jax.tree.flatten(tree)
    leaves, length = _check_leaves(leaves)
    names = bound_axes(axis_name)
    if not length:
        return tree
    if names:
        _check_same(key, names)
        out, into = _route(key, length, names)
        route = _reverse(out, into) if back else (out, into)
        leaves = _move(names, route, leaves)
    else:
        order = jax.random.permutation(key, length)
        order = jnp.argsort(order) if back else order
        leaves = [_gather_rows(leaf, order) for leaf in leaves]
    return jax.tree.unflatten(treedef, leaves)


def _gather_rows(leaf: jax.Array, order: jax.Array) -> jax.Array:
    # With Explicit mesh axes, the sharding of the result must be given.
    kind = jax.typeof(leaf).sharding
    kind = None if kind.mesh.empty else kind
    return leaf.at[order].get(
        unique_indices=True, mode="promise_in_bounds", out_sharding=kind
    )


def _route(
    key: jax.Array, length: int, names: Names
) -> tuple[jax.Array, jax.Array]:
    """Returns the row to send in each slot, and the slot of each received row.

    Slots form D blocks, one per device. A row index of n or more leaves the
    slot empty.
    """
    devices = jax.lax.axis_size(names)
    share, more = divmod(length, devices)
    block = math.ceil(length / devices)
    me = jax.lax.axis_index(names)
    sent, received, turn = jax.random.split(key, 3)
    # Pairs (from, to) on `more` of D diagonals exchange an additional row.
    turn = jax.random.randint(turn, (), 0, devices)
    others = jnp.arange(devices)

    def full(away: jax.Array) -> jax.Array:
        """Returns which slots are used, with block i `away` devices ahead."""
        sizes = share + ((away + turn) % devices < more).astype(away.dtype)
        return (jnp.arange(block)[None] < sizes[:, None]).reshape(-1)

    used = full(others - me)
    order = jax.random.permutation(jax.random.fold_in(sent, me), length)
    spare = length + jnp.arange(used.size)
    out = jnp.where(used, order[jnp.cumsum(used) - 1], spare)
    used = jnp.argsort(~full(me - others), stable=True)[:length]
    order = jax.random.permutation(jax.random.fold_in(received, me), length)
    return out, used[order]


def _reverse(out: jax.Array, into: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the inverse route."""
    length, slots = into.size, out.size
    back = length + jnp.arange(slots)
    back = back.at[into].set(jnp.arange(length), unique_indices=True)
    home = jnp.zeros_like(into)
    home = home.at[out].set(jnp.arange(slots), mode="drop", unique_indices=True)
    return back, home


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _move(
    names: Names,
    route: tuple[jax.Array, jax.Array],
    leaves: list[jax.Array],
) -> list[jax.Array]:
    """Sends the leaves along the route as uint32."""
    parts = _all_to_all(names, route, [to_uint32(leaf) for leaf in leaves])
    return [from_uint32(part, leaf) for part, leaf in zip(parts, leaves)]


@functools.partial(_move.defjvp, symbolic_zeros=True)
def _move_jvp(
    names: Names, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    route, leaves = primals
    out = list(tangents[1])  # symbolic zeros stay symbolic zeros
    moving = [i for i, t in enumerate(out) if not isinstance(t, SymbolicZero)]
    if moving:
        # Bits are not differentiable: tangents are sent as numbers in the
        # widest dtype, which represents the others exactly.
        double = any(jnp.finfo(out[i].dtype).bits == 64 for i in moving)
        mixed = len({jnp.finfo(out[i].dtype).dtype for i in moving}) > 1
        wide = jnp.float64 if double else jnp.float32 if mixed else None
        parts = [to_reals(out[i], wide) for i in moving]
        for i, part in zip(moving, _all_to_all(names, route, parts)):
            out[i] = from_reals(part, out[i])
    return _move(names, route, leaves), out


def _all_to_all(
    names: Names,
    route: tuple[jax.Array, jax.Array],
    parts: list[jax.Array],
) -> list[jax.Array]:
    """Sends parts (n, k) of equal dtype along the route in one collective."""
    out, into = route
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    rows = jnp.concatenate(parts, 1)
    rows = rows.at[out].get(mode="fill", fill_value=0, unique_indices=True)
    rows = jax.lax.all_to_all(rows, names, 0, 0, tiled=True)
    rows = rows.at[into].get(mode="promise_in_bounds", unique_indices=True)
    return jnp.split(rows, ends[:-1], 1)


def _check_leaves(leaves: list[Any]) -> tuple[list[jax.Array], int]:
    """Returns leaves as arrays, and their common length."""
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for leaf in leaves:
        if not leaf.ndim:
            raise ValueError(
                f"a leaf is the scalar {describe(leaf)}, but the first axis of "
                "every leaf must be that of examples. Remove it from the tree, "
                "for example replace it by None."
            )
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(
            "leaves must hold the same number of examples along their first "
            f"axis; got {', '.join(sorted(map(describe, leaves)))}."
        )
    return leaves, lengths.pop() if lengths else 0


def _check_key(key: jax.Array) -> jax.Array:
    """Returns one typed key."""
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError):
            raise ValueError(
                "key must be one of jax.random.key or jax.random.PRNGKey; got "
                f"{describe(key)}."
            ) from None
    if key.shape:
        raise ValueError(f"key must be a single key; got {describe(key)}.")
    return key


def _check_same(key: jax.Array, names: Names) -> None:
    differing = [name for name in names if name in varying_axes(key)]
    if differing:
        raise ValueError(
            f"key varies over the mesh axes {differing}, but must be equal on "
            "all devices: pass it with PartitionSpec(), and do not fold in the "
            "device index."
        )
