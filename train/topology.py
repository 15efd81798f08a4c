"""Processes, devices and the mesh that a run is spread over."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train import UserError

AXES = ("replica", "data")
MICROBATCH_AXIS = "micro"  # of the microbatches of a step, which no mesh has


class Topology(NamedTuple):
    """The devices of a run; the batch lies on all axes of the mesh."""

    mesh: Mesh

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.mesh.axis_names)

    @property
    def batch(self) -> NamedSharding:
        """Sharding of a batch: examples over all devices."""
        return NamedSharding(self.mesh, P(self.axes))

    @property
    def everywhere(self) -> NamedSharding:
        """Sharding of what every device holds whole."""
        return NamedSharding(self.mesh, P())

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the places in a batch that this process reads, ascending."""
        parts = self.batch.addressable_devices_indices_map((batch_size,))
        every = [np.arange(batch_size)[index] for index in parts.values()]
        return np.unique(np.concatenate(every))

    def padded(self, examples: int) -> int:
        """Returns the next number of examples that the devices divide."""
        devices = self.mesh.size
        return -(-examples // devices) * devices

    def put(self, rows: Any, batch_size: int, *, stacked: bool = False) -> Any:
        """Returns global arrays of the rows that each process has read.

        Args:
          rows: tree of arrays with the rows of a batch on axis 0, or stacked
            on axis 1 behind an axis of batches.
          batch_size: of all processes together.
          stacked: whether there is such an axis.
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
      spec: "data", or axes with lengths such as "replica=2,data=4"; one axis
        may lack a length and takes the devices that are left.
      batch_size: examples of a batch, which the devices must divide.
      microbatches: which must divide the share of a device.

    Raises:
      UserError: spec is malformed or does not fit the devices, or they do not
        divide the batch, or the microbatches not their shares.
    """
    devices = jax.device_count()
    shape: dict[str, int | None] = {}
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*(?:=\s*(\d+)\s*)?", part)
        if not found or found[1] not in AXES or found[1] in shape:
            raise UserError(
                f"mesh={spec!r}: write the axes {' and '.join(AXES)} once each, "
                "such as data, or replica=2,data=4."
            )
        shape[found[1]] = int(found[2]) if found[2] else None
    known = math.prod(size for size in shape.values() if size is not None)
    free = [name for name, size in shape.items() if size is None]
    if len(free) == 1 and known and devices % known == 0:
        shape[free[0]] = devices // known
    elif free or known != devices:
        raise UserError(
            f"mesh={spec!r} does not fit {devices} devices: the lengths must "
            "multiply to that number."
        )
    if batch_size % devices:
        below = batch_size // devices * devices
        nearest = " or ".join(str(n) for n in (below, below + devices) if n)
        raise UserError(
            f"batch_size={batch_size} does not split over {devices} devices; "
            f"the nearest that does is {nearest}."
        )
    if batch_size // devices % microbatches:
        raise UserError(
            f"microbatches={microbatches} does not divide the "
            f"{batch_size // devices} examples that each of {devices} devices "
            f"takes of batch_size={batch_size}."
        )
    names, sizes = zip(*shape.items())
    auto = (AxisType.Auto,) * len(names)
    return Topology(jax.make_mesh(sizes, names, axis_types=auto))
