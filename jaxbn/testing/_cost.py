"""The time that synchronization takes, from a compiled program and a link."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxbn.testing._collectives import (
    compiled_text,
    parse,
    split_conditional,
)
from jaxbn.testing._cost_model import Cost, Figure, Operation, cost_of


class SyncCost(NamedTuple):
    """Result of `sync_cost`; str() is a table.

    Attributes:
      devices: number of devices that the costs are for.
      forward: `Cost` of batch norm in the forward pass.
      backward: `Cost` of batch norm in the backward pass.
      rest: `Cost` without synchronization, such as that of the gradient.
      compute: seconds of a step without communication, or None.
    """

    devices: int
    forward: Cost
    backward: Cost
    rest: Cost
    compute: float | None

    @property
    def seconds(self) -> float:
        """Seconds of synchronization per step, forward and backward."""
        return self.forward.seconds + self.backward.seconds

    @property
    def share(self) -> float | None:
        """Fraction of a step spent on synchronization; None if compute is."""
        if self.compute is None:
            return None
        return self.seconds / (self.compute + self.seconds + self.rest.seconds)

    def __str__(self) -> str:
        rows = {
            "batch norm, forward": self.forward,
            "batch norm, backward": self.backward,
            "the rest": self.rest,
        }
        lines = [
            f"{self.devices} devices{'collectives':>24}{'MB':>10}{'ms':>9}"
        ]
        lines += [
            f"{name:<22}{c.count:>10}{c.sent / 1e6:>13.3f}"
            f"{1e3 * c.seconds:>9.3f}"
            for name, c in rows.items()
        ]
        if self.compute is not None:
            lines.append(
                f"synchronization is {self.share:.1%} of a step that computes "
                f"for {1e3 * self.compute:.3f} ms"
            )
        return "\n".join(lines)


def sync_cost(
    fn: Callable[..., Any],
    *args: Any,
    latency: Figure,
    bandwidth: Figure,
    unsynchronized: Callable[..., Any] | None = None,
    devices: int | None = None,
    compute: float | None = None,
) -> SyncCost:
    """Estimates the time that fn spends on synchronization, without running it.

    The number and size of collectives are those of the compiled program;
    latency and bandwidth of the link are arguments. Over n devices, with S the
    bytes of a result::

        all-reduce       latency(n) + 2 (n - 1) / n * S / bandwidth(n)
        all-gather       latency(n) +   (n - 1) / n * S / bandwidth(n)
        reduce-scatter   latency(n) +   (n - 1) / n * n S / bandwidth(n)

    An all-to-all costs as much as an all-gather; a permutation and a broadcast
    send S bytes. The sum over all collectives is a model, not a measurement: it
    assumes that links reach their stated speed, and that communication does not
    overlap with computation.

    The cost of batch norm is the cost of fn minus that of `unsynchronized`:
    collectives that XLA has merged with those of the gradient add no latency of
    their own. What JAX marks as transposed, or what runs after it, belongs to
    the backward pass.

    The program is that of the backend which fn is compiled for. On GPUs a layer
    has one more all-reduce forward, of C floats: if CPU devices stand in for
    GPUs, add one latency per layer.

    Args:
      fn: a function, or the result of `jax.jit`, over several devices.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      latency: seconds that a collective of almost no data takes as a whole, or
        a function of n. Vendors do not publish it; measure it.
      bandwidth: bytes per second that a device sends on all its links together,
        such as LINKS["nvlink4"], or a function of n.
      unsynchronized: fn with axis_name=None in its layers. None assumes that fn
        only sends statistics; the all-reduce of a gradient then counts as
        theirs.
      devices: number of devices; None is the number that fn is compiled for.
        Otherwise collectives over all devices are scaled to this number, with
        inputs of the same size; those within groups stay the same.
      compute: seconds of a step without communication, to compare with.

    Returns:
      SyncCost.

    Raises:
      ValueError: latency, bandwidth or compute is out of range; fn is compiled
        for one device or for groups larger than devices, or has a collective
        without a formula; or unsynchronized sends more than fn.

    Source: Thakur, Rabenseifner, Gropp (2005), Optimization of Collective
    Communication Operations in MPICH, section 4; Patarasuk and Yuan (2009),
    Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations.
    """
    if compute is not None and not compute > 0:
        raise ValueError(f"compute must be positive seconds; got {compute}.")
    compiled_for, operations = _read(fn, args)
    devices = compiled_for if devices is None else devices
    if devices < 1 or (compiled_for == 1 and devices > 1):
        raise ValueError(
            f"devices={devices}, and the program is compiled for "
            f"{compiled_for}. Compile it for at least two, simulated ones will "
            "do: jax.config.update('jax_num_cpu_devices', 8)."
        )

    def cost(operation: Operation) -> Cost:
        return cost_of(operation, compiled_for, devices, latency, bandwidth)

    halves = [Cost(0, 0.0, 0.0)] * 2
    for operation in operations:
        halves[operation.backward] += cost(operation)
    rest = Cost(0, 0.0, 0.0)
    others = [] if unsynchronized is None else _read(unsynchronized, args)[1]
    for other in others:
        rest += cost(other)
        # It may run elsewhere there: fn determines the pass. Collectives that
        # fn has merged with others belong to the gradient.
        same = [o.backward for o in operations if o[:3] == other[:3]]
        halves[any(same) or not same] -= cost(other)
    if halves[0].sent + halves[1].sent < 0:
        raise ValueError(
            f"unsynchronized sends {rest.sent:.0f} bytes, more than fn. It "
            "must be the same function whose layers have axis_name=None."
        )
    forward, backward = halves
    return SyncCost(devices, forward, backward, rest, compute)


def group_costs(
    make: Callable[[int], Callable[..., Any]],
    *args: Any,
    sizes: Iterable[int],
    **options: Any,
) -> dict[int, SyncCost]:
    """Returns `sync_cost` for each size of the groups that share statistics.

    Groups pay off if a collective over few devices is cheaper than one over all
    of them: give latency or bandwidth as a function of n. Groups use an
    all-gather instead of an all-reduce, and another all-reduce over all devices
    for the running statistics.

    Args:
      make: group size -> fn whose layers have that group_size.
      *args: arguments of fn.
      sizes: group sizes. The number of devices that fn is compiled for stands
        for all devices.
      **options: options of `sync_cost`.

    Returns:
      dict from group size to SyncCost, in the order of sizes.

    Raises:
      ValueError: as in `sync_cost`.
    """
    return {k: sync_cost(make(k), *args, **options) for k in sizes}


def _read(
    fn: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[int, list[Operation]]:
    """Returns the number of devices, and the collectives in program order."""
    hlo = re.sub(r"/\*.*?\*/", "", compiled_text(fn, *args))
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo)
    devices = math.prod(map(int, counts))
    found, in_entry, turned = [], False, False
    always, _ = split_conditional(hlo)
    for line in always.splitlines():
        in_entry = in_entry or line.startswith("ENTRY ")
        for kind, (_, size) in parse(line).items():
            transposed = "transpose(" in line
            # The entry computation is printed in the order of execution.
            turned = turned or (in_entry and transposed)
            backward = transposed or (in_entry and turned)
            members = _members(line, devices)
            found.append(Operation(kind, size, members, backward))
    return devices, found


def _members(line: str, devices: int) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:  # {{0,1},{2,3}}
        return listed[1].count(",") + 1
    numbered = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if numbered:  # [groups,members]<=[devices]
        return int(numbered[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line)
    if named:  # mesh['a'=4,'b'=2] {'a','b':(1)2}, a part of an axis by its size
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if re.search(r"replica_groups=(?!\{\})", line):
        raise ValueError(f"Groups in an unknown form: {line.strip()[:300]}")
    return devices
