"""Sums over mapped axes, or groups of devices, in a single collective."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxbn._axis_names import AxisName, bound_axes
from jaxbn._compat import Names, bind_axes, explicit_spec, varying_axes

Partition = tuple[tuple[int, ...], ...]


class Devices(NamedTuple):
    """Mapped axes to sum over; without names, only this device."""

    names: Names = ()
    sizes: tuple[int, ...] = ()
    groups: Partition | None = None  # of device indices on the axes

    @property
    def size(self) -> int:
        """Number of devices that share a sum."""
        if self.groups is not None:
            return len(self.groups[0])
        return math.prod(self.sizes)

    def without(self, names: Names) -> Devices:
        """Returns the devices along the other axes."""
        rest = [
            (name, size)
            for name, size in zip(self.names, self.sizes)
            if name not in names
        ]
        return Devices(
            tuple(name for name, _ in rest), tuple(size for _, size in rest)
        )


THIS_DEVICE = Devices()


def devices_along(axis_name: AxisName) -> Devices:
    """Returns all devices along named axes; see `bound_axes`."""
    names = bound_axes(axis_name)
    return Devices(names, tuple(jax.lax.axis_size(name) for name in names))


def all_sum(tree: Any, devices: Devices) -> Any:
    """Sums every leaf over devices, in a single collective.

    Numpy arrays are equal on all devices; they are multiplied instead.
    """
    if not devices.names:
        return tree
    leaves, treedef = jax.tree.flatten(tree)

    def reduce(flat: jax.Array) -> Any:
        with bind_axes(devices.names, devices.sizes):
            if devices.groups is None:
                return jax.lax.psum(flat, devices.names)
            return _gather(flat, devices.names, devices.groups).sum(0)

    traced = [a for a in leaves if not isinstance(a, np.ndarray)]
    summed = iter(_map_flat(reduce, traced))
    return jax.tree.unflatten(
        treedef,
        [
            a * a.dtype.type(devices.size)
            if isinstance(a, np.ndarray)
            else next(summed)
            for a in leaves
        ],
    )


def all_agree(flag: jax.Array, devices: Devices) -> jax.Array:
    """Returns a flag that is equal on all devices of a collective.

    Members of groups with their own collective agree already.
    """
    if devices.groups is None or _supports_groups(devices.names):
        return flag
    all_devices = devices._replace(groups=None)
    agreed: jax.Array = all_sum(flag.astype(jnp.float32), all_devices) > 0
    return agreed


def _supports_groups(names: Names) -> bool:
    """Whether all_gather supports groups here.

    Under vmap and in lockstep no collective does; psum never does in shard_map.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return _microbatches.get() is None and set(names) <= set(manual)


_microbatches: contextvars.ContextVar[Hashable | None] = contextvars.ContextVar(
    "microbatches", default=None
)


@contextlib.contextmanager
def lockstep(axis_name: Hashable) -> Iterator[None]:
    """Context for tracing a function with microbatches along axis_name."""
    token = _microbatches.set(axis_name)
    try:
        yield
    finally:
        _microbatches.reset(token)


def microbatch_axis(devices: Devices) -> Hashable | None:
    """Returns the axis of the microbatches among devices, or None."""
    name = _microbatches.get()
    return name if name in devices.names else None


def _gather(flat: jax.Array, names: Names, groups: Partition) -> jax.Array:
    """Stacks the vectors of the devices of a group."""
    all_devices: jax.Array
    if _supports_groups(names):
        all_devices = jax.lax.all_gather(flat, names, axis_index_groups=groups)
        return all_devices
    members = {i: group for group in groups for i in group}
    own = jnp.array([members[i] for i in range(len(members))])
    all_devices = jax.lax.all_gather(flat, names)
    return all_devices[own[jax.lax.axis_index(names)]]


def _map_flat(
    fn: Callable[[jax.Array], Any], leaves: list[jax.Array]
) -> list[jax.Array]:
    """Applies fn to all leaves as one vector, and keeps their shardings.

    Leaves that are sharded differently over Explicit mesh axes cannot be
    concatenated: the compiler chooses the sharding of the vector.
    """

    def run(leaves: list[jax.Array]) -> Any:
        flat, unravel = _ravel(leaves)
        return unravel(fn(flat))

    specs = [explicit_spec(jax.typeof(leaf)) or P() for leaf in leaves]
    if any(map(any, specs)):
        run = without_explicit_axes(run, specs)
    mapped: list[jax.Array] = run(leaves)
    return mapped


def without_explicit_axes(fn: Any, out_sharding: Any) -> Any:
    """Leaves shardings inside fn to the compiler.

    With Explicit mesh axes, chunks of a sharded axis cannot be typed: a chunk
    of examples may span devices. Nor can vmap map a conditional that has
    sharded inputs. Microbatches in lockstep can stop at any collective, where
    no value may be on another mesh, so nothing is left to the compiler there.
    """
    explicit = tuple(jax.sharding.get_abstract_mesh().explicit_axes)
    if not explicit or _microbatches.get() is not None:
        return fn
    return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=out_sharding)


def _ravel(leaves: list[jax.Array]) -> tuple[jax.Array, Any]:
    """Returns all leaves as one real vector, and its inverse."""
    parts: list[jax.Array] = []
    for leaf in leaves:
        pair = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
        parts.extend(part.reshape(-1) for part in pair)
    ends = list(itertools.accumulate(part.size for part in parts))

    def unravel(flat: jax.Array) -> list[jax.Array]:
        pieces = iter(jnp.split(flat, ends[:-1]))
        out = []
        for leaf in leaves:
            piece = next(pieces)
            if jnp.iscomplexobj(leaf):
                piece = jax.lax.complex(piece, next(pieces))
            out.append(piece.reshape(leaf.shape))
        return out

    return jnp.concatenate(parts), unravel


def vary_like(tree: Any, x: jax.Array) -> Any:
    """Casts statistics to vary over the mesh axes that x varies over.

    Under shard_map with check_vma=True, the transpose of this cast is the only
    psum of the backward pass; implicit casts would add one per use. Elsewhere
    it is a no-op.
    """
    leaves, treedef = jax.tree.flatten(tree)
    axes = varying_axes(x).difference(*map(varying_axes, leaves))
    if not axes:
        return tree

    def cast(flat: jax.Array) -> Any:
        return jax.lax.pcast(flat, tuple(axes), to="varying")

    return jax.tree.unflatten(treedef, _map_flat(cast, leaves))
