"""Examples to random devices and back, in one exchange for a whole tree."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxbn._bitcast import from_reals, from_uint32, to_reals, to_uint32
from jaxbn._checks import AxisName, bound_axes
from jaxbn._compat import varying_axes

Names = tuple[Hashable, ...]


def shuffle(tree: Any, key: jax.Array, *, axis_name: AxisName) -> Any:
    """Moves every example to a random device and position.

    For contrastive learning: where each device normalizes its own examples, a
    query and its key must not share statistics, or the network reads from
    them which pairs belong together. Shuffle the inputs of the key encoder,
    and `unshuffle` what it returns.

    Of n examples on each of D devices, every device sends n / D drawn at
    random to each, itself too, and puts what it receives in random order. So
    an example is equally likely to come to any of the n D places. Not all
    (n D)! orders occur: two examples of different devices meet with
    probability 1 / D, two of one device with (n / D - 1) / (n - 1), where a
    free order has (n - 1) / (n D - 1) for both. Where D does not divide n,
    blocks have ceil(n / D) places, of which some stay empty; which devices
    send each other one more is drawn too.

    One all-to-all for the whole tree, as bits: a device receives
    D ceil(n / D) B bytes, about n B, with B bytes an example, each leaf
    rounded up to four. To gather the whole batch would be n D B.

    Derivatives of every kind take the same route, the transpose the way back;
    tangents of several dtypes travel in the widest.

    Args:
      tree: pytree of arrays of any dtype, (n, ...) each: images, labels,
        masks, typed keys.
      key: of `jax.random.key` or `jax.random.PRNGKey`, the same on all
        devices, a new one each step. With the sizes n and D it decides where
        everything goes.
      axis_name: name, or tuple of names, of the mapped axes that the batch
        lies on. Not bound and no named axis in scope: the tree is the whole
        batch, and leaves are permuted one by one as the compiler sees fit.
        None permutes the examples of each device.

    Returns:
      The tree with examples moved, bit for bit.

    Raises:
      ValueError: a leaf is a scalar, leaves differ in length, key is not one
        key or is known to differ between devices, or axis_name is not bound
        though another named axis is.

    Source: He et al. (2020), Momentum Contrast, section 3.3 (shuffling BN).
    """
    return _permute(tree, key, axis_name, back=False)


def unshuffle(tree: Any, key: jax.Array, *, axis_name: AxisName) -> Any:
    """Moves every example back: undoes `shuffle` of the same key.

    The tree may be another one with as many examples: what a model returned
    for the shuffled one. One all-to-all, as there.

    Args:
      tree: pytree of arrays of any dtype, (n, ...) each.
      key: the key that `shuffle` was given.
      axis_name: as there.

    Returns:
      The tree with examples in the order from before.

    Raises:
      ValueError: as in `shuffle`.

    Source: He et al. (2020), Momentum Contrast, section 3.3 (shuffling BN).
    """
    return _permute(tree, key, axis_name, back=True)


def _permute(tree: Any, key: jax.Array, axis_name: AxisName, back: bool) -> Any:
    key = _check_key(key)
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
    # Where mesh axes are Explicit, the order could not say how it is split.
    kind = jax.typeof(leaf).sharding
    kind = None if kind.mesh.empty else kind
    return leaf.at[order].get(
        unique_indices=True, mode="promise_in_bounds", out_sharding=kind
    )


def _route(
    key: jax.Array, length: int, names: Names
) -> tuple[jax.Array, jax.Array]:
    """Returns the row to put in each slot, and the slot each row comes from.

    Slots are those of D blocks, one for each device of the other end. A row
    of n or more leaves a slot empty.
    """
    devices = jax.lax.axis_size(names)
    share, more = divmod(length, devices)
    block = math.ceil(length / devices)
    me = jax.lax.axis_index(names)
    sent, received, turn = jax.random.split(key, 3)
    # Pairs (from, to) on `more` of D diagonals exchange one row more.
    turn = jax.random.randint(turn, (), 0, devices)
    others = jnp.arange(devices)

    def full(away: jax.Array) -> jax.Array:
        """Slots in use, where block i is `away` devices ahead."""
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
    """Returns the route of the way back."""
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
    """Takes the leaves along the route as words of 32 bits."""
    parts = _all_to_all(names, route, [to_uint32(leaf) for leaf in leaves])
    return [from_uint32(part, leaf) for part, leaf in zip(parts, leaves)]


@functools.partial(_move.defjvp, symbolic_zeros=True)
def _move_jvp(
    names: Names, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    route, leaves = primals
    out = list(tangents[1])  # where nothing moves, nothing arrives
    moving = [i for i, t in enumerate(out) if not isinstance(t, SymbolicZero)]
    if moving:
        # Bits have no derivative: tangents travel as numbers, all of the
        # widest dtype, which holds those of the others exactly.
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
    """Takes parts (n, k), all of one dtype, along the route together."""
    out, into = route
    ends = list(itertools.accumulate(part.shape[1] for part in parts))
    rows = jnp.concatenate(parts, 1)
    rows = rows.at[out].get(mode="fill", fill_value=0, unique_indices=True)
    rows = jax.lax.all_to_all(rows, names, 0, 0, tiled=True)
    rows = rows.at[into].get(mode="promise_in_bounds", unique_indices=True)
    return jnp.split(rows, ends[:-1], 1)


def _check_leaves(leaves: list[Any]) -> tuple[list[jax.Array], int]:
    """Returns leaves as arrays and the length that all of them have."""
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for leaf in leaves:
        if not leaf.ndim:
            raise ValueError(
                f"a leaf is the scalar {_describe(leaf)}: examples lie along "
                "the first axis of every leaf. Take it out of the tree, for "
                "example by None."
            )
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(
            "leaves must hold the same number of examples along their first "
            f"axis; got {', '.join(sorted(map(_describe, leaves)))}."
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
                f"{_describe(key)}."
            ) from None
    if key.shape:
        raise ValueError(
            f"key must be one key; got {_describe(key)}. Choose one of them."
        )
    return key


def _check_same(key: jax.Array, names: Names) -> None:
    differing = [name for name in names if name in varying_axes(key)]
    if differing:
        raise ValueError(
            f"key varies over the mesh axes {differing}, and must be the same "
            "on all devices: pass it with PartitionSpec(), and do not fold "
            "the index of the device in."
        )


def _describe(x: jax.Array) -> str:
    return f"{x.dtype.name}{list(x.shape)}"
