"""The device mesh, and how batches are sharded over it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import UserError

AXES = ("replica", "data")
MICROBATCH_AXIS = "micro"  # vmapped axis of the microbatches of a step


class Topology(NamedTuple):
    """The mesh of a run; batches are sharded over all of its axes."""

    mesh: Mesh

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that programs reduce over; none on a single device.

        XLA may keep a reduction over one device, with its launch.
        """
        return tuple(self.mesh.axis_names) if self.mesh.size > 1 else ()

    @property
    def batch(self) -> NamedSharding:
        """Sharding of a batch: examples over all devices."""
        return NamedSharding(self.mesh, P(self.axes))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of replicated arrays."""
        return NamedSharding(self.mesh, P())

    def shard_map(
        self, function: Callable[..., Any], in_specs: Any
    ) -> Callable[..., Any]:
        """Maps a function with replicated results over the devices.

        On a single device, returns the function.
        """
        if self.mesh.size == 1:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=P(),
            check_vma=True,
        )

    def replicate(self, tree: Any) -> Any:
        """Copies host arrays, equal in all processes, to every device."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.replicated)
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(
                a.shape, self.replicated, lambda index: np.asarray(a[index])
            ),
            tree,
        )

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the sorted indices in a batch that this process reads."""
        parts = self.batch.addressable_devices_indices_map((batch_size,))
        every = [np.arange(batch_size)[index] for index in parts.values()]
        return np.unique(np.concatenate(every))

    def padded(self, examples: int) -> int:
        """Rounds a number of examples up to a multiple of the devices."""
        devices = self.mesh.size
        return -(-examples // devices) * devices

    def put(self, rows: Any, batch_size: int, *, stacked: bool = False) -> Any:
        """Returns global arrays made of the rows that each process has read.

        Args:
          rows: tree of arrays, (rows, ...), or (batches, rows, ...) if stacked.
          batch_size: global batch size, over all processes.
          stacked: whether there is a leading axis of batches.
        """
        sharding = self.batch
        if stacked:
            sharding = NamedSharding(self.mesh, P(None, self.axes))
        if jax.process_count() == 1:
            return jax.device_put(rows, sharding)
        own, axis = self.rows(batch_size), int(stacked)

        def place(leaf: np.ndarray) -> jax.Array:
            shape = (*leaf.shape[:axis], batch_size, *leaf.shape[axis + 1 :])
            parts = sharding.addressable_devices_indices_map(shape)
            shards = []
            for device, index in parts.items():
                first, last, _ = index[axis].indices(batch_size)
                start, stop = np.searchsorted(own, (first, last))
                here = (slice(None),) * axis + (slice(start, stop),)
                shards.append(jax.device_put(leaf[here], device))
            return jax.make_array_from_single_device_arrays(
                shape, sharding, shards
            )

        return jax.tree.map(place, rows)


def make_topology(
    spec: str, batch_size: int, microbatches: int = 1
) -> Topology:
    """Returns the topology over all devices of all processes.

    Args:
      spec: "data", or axes with sizes such as "replica=2,data=4"; the size of
        one axis may be omitted and is inferred.
      batch_size: global batch size, a multiple of the number of devices.
      microbatches: divides the batch size per device.

    Raises:
      UserError: spec is malformed or does not match the devices, or batch_size
        or microbatches does not divide.
    """
    devices = jax.device_count()
    shape: dict[str, int | None] = {}
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*(?:=\s*(\d+)\s*)?", part)
        if not found or found[1] not in AXES or found[1] in shape:
            raise UserError(
                f"mesh={spec!r}: write the axes {' and '.join(AXES)} once "
                "each, such as data, or replica=2,data=4."
            )
        shape[found[1]] = int(found[2]) if found[2] else None
    known = math.prod(size for size in shape.values() if size is not None)
    free = [name for name, size in shape.items() if size is None]
    if len(free) == 1 and known and devices % known == 0:
        shape[free[0]] = devices // known
    elif free or known != devices:
        raise UserError(
            f"mesh={spec!r} does not match {devices} devices: the product of "
            "the sizes must be equal."
        )
    if batch_size % devices:
        below = batch_size // devices * devices
        nearest = " or ".join(str(n) for n in (below, below + devices) if n)
        raise UserError(
            f"batch_size={batch_size} must be divisible by {devices} devices, "
            f"such as {nearest}."
        )
    if batch_size // devices % microbatches:
        raise UserError(
            f"microbatches={microbatches} does not divide the "
            f"{batch_size // devices} examples per device of "
            f"batch_size={batch_size} on {devices} devices."
        )
    names, sizes = zip(*shape.items())
    auto = (AxisType.Auto,) * len(names)
    return Topology(jax.make_mesh(sizes, names, axis_types=auto))
