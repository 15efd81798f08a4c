"""Selects the examples that share statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax

from jaxbn._axis_names import AxisName, all_names
from jaxbn._check_values import check_at_least
from jaxbn._checks import given_fields
from jaxbn._collectives import (
    THIS_DEVICE,
    Devices,
    Partition,
    devices_along,
    microbatch_axis,
)
from jaxbn._reduction import Reduction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """Which examples share statistics; by default all along `axis_name`.

    All combinations work, with masks, in shard_map, pmap, vmap and under jit on
    global arrays. The moments that `batch_norm` returns, and so the running
    statistics, are those of all examples (for each id), merged by the law of
    total variance: equal on every device, whatever the groups.

    Attributes:
      group_size: number of consecutive devices along `axis_name` that share
        statistics; must divide the number of devices.
      axis_index_groups: lists of device indices that share statistics, of equal
        length: an arbitrary partition.
      normalize_over: number of examples that share statistics, independent of
        the topology: larger local batches are split into contiguous chunks
        (ghost batch normalization), smaller ones are joined with those of
        consecutive devices.
      num_ids: K; every example has an id in [0, K), and each id has its own
        statistics, as in domain-specific and split (auxiliary) batch
        normalization.

    Source: Hoffer et al. (2017), Train longer, generalize better (ghost);
    Xie et al. (2020), Adversarial Examples Improve Image Recognition (split).
    """

    group_size: int | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    normalize_over: int | None = None
    num_ids: int | None = None

    def __post_init__(self) -> None:
        ways = ("group_size", "axis_index_groups", "normalize_over")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} both choose the devices that share "
                "statistics; set only one of them."
            )
        for name in ("group_size", "normalize_over", "num_ids"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 1)
        if self.axis_index_groups is not None:
            # Hashable, so that modules with a Scope are hashable.
            groups = tuple(tuple(group) for group in self.axis_index_groups)
            object.__setattr__(self, "axis_index_groups", groups)

    __repr__ = given_fields

    def without_groups(self) -> Scope:
        """Returns the scope without groups of devices."""
        return dataclasses.replace(
            self, group_size=None, axis_index_groups=None
        )

    def resolve(
        self, x: jax.Array, axes: tuple[int, ...], axis_name: AxisName
    ) -> tuple[Reduction, Devices]:
        """Returns the local reduction, and the devices to reduce over."""
        devices = devices_along(axis_name)
        examples = x.shape[axes[0]] if axes else 1
        reduction = Reduction(x.shape, axes, num_ids=self.num_ids)
        if self.axis_index_groups is not None:
            if not devices.names:
                raise ValueError(
                    f"axis_index_groups={self.axis_index_groups} refers to "
                    f"devices along axis_name={axis_name!r}, which is not "
                    "bound here. On global arrays use group_size or "
                    "normalize_over."
                )
            groups = tuple(tuple(group) for group in self.axis_index_groups)
            _check_groups(groups, devices.size, axis_name)
            return reduction, devices._replace(groups=groups)
        size, over = self.group_size, self.normalize_over
        if size is not None and not devices.names:
            # x is global: a group is the chunk of its devices.
            on_mesh = _devices_of_mesh(axis_name, size)
            if on_mesh % size:
                raise ValueError(_uneven(size, on_mesh, axis_name))
            _check_share(size, on_mesh, examples)
            over = examples * size // on_mesh
            size = None
        micro = microbatch_axis(devices) if axes else None
        if over is not None and micro is not None:
            return _over_microbatches(over, reduction, devices, micro)
        if over is not None:
            chunks, size = _split_or_join(over, examples, devices.size)
            reduction = reduction._replace(chunks=chunks)
            if size == 1:
                return reduction, THIS_DEVICE
        if size is None or size == devices.size:
            return reduction, devices
        if devices.size % size:
            raise ValueError(_uneven(size, devices.size, axis_name))
        return reduction, _in_groups(devices, size)


def _in_groups(devices: Devices, size: int) -> Devices:
    """Groups consecutive devices; size must divide their number."""
    if size == devices.size:
        return devices
    starts = range(0, devices.size, size)
    groups = tuple(tuple(range(i, i + size)) for i in starts)
    return devices._replace(groups=groups)


def _over_microbatches(
    over: int, reduction: Reduction, devices: Devices, micro: Hashable
) -> tuple[Reduction, Devices]:
    """`normalize_over` where microbatch i of k holds examples i, i + k, ...

    Consecutive examples are then the same rows of several microbatches.
    """
    rest = tuple(name for name in devices.names if name != micro)
    devices, others = devices_along((*rest, micro)), devices_along(rest)
    here = devices_along((micro,))
    rows = reduction.examples
    k, examples = here.size, here.size * rows
    if over % examples == 0 and others.size % (over // examples) == 0:
        return reduction, _in_groups(devices, over // rows)
    if examples % over == 0 and over % k == 0:
        return reduction._replace(chunks=examples // over), here
    if examples % over == 0 and k % over == 0:
        return reduction._replace(chunks=rows), _in_groups(here, over)
    possible = {n for n in range(1, examples + 1) if examples % n == 0}
    possible = {n for n in possible if n % k == 0 or k % n == 0}
    possible |= {
        n * examples for n in range(1, others.size + 1) if others.size % n == 0
    }
    nearest = min(possible, key=lambda n: (abs(n - over), n))
    raise ValueError(
        f"normalize_over={over} is invalid for {k} microbatches of {rows} "
        f"examples on each of {others.size} devices: it must divide the "
        f"{examples} examples per device, and be a multiple or divisor of {k}; "
        f"or be a multiple of {examples} that divides the devices. The nearest "
        f"valid value is {nearest}."
    )


def _split_or_join(over: int, examples: int, devices: int) -> tuple[int, int]:
    """Returns (chunks per device, devices per group); one of them is 1."""
    if isinstance(examples, int) and not examples:
        return 1, 1
    if examples % over == 0:
        return examples // over, 1
    if (
        isinstance(examples, int)
        and over % examples == 0
        and devices % (over // examples) == 0
    ):
        return 1, over // examples
    if not isinstance(examples, int):
        raise ValueError(
            f"normalize_over={over} must divide the {examples} examples per "
            f"device: export with a batch size such as {over}*b."
        )
    possible = {n for n in range(1, examples + 1) if examples % n == 0}
    possible |= {
        n * examples for n in range(1, devices + 1) if devices % n == 0
    }
    nearest = min(possible, key=lambda n: (abs(n - over), n))
    raise ValueError(
        f"normalize_over={over} neither divides the {examples} examples per "
        f"device nor is a multiple that divides {devices} devices; the "
        f"nearest valid value is {nearest}."
    )


def _devices_of_mesh(axis_name: AxisName, size: int) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    names = all_names(axis_name)
    if not names or any(n not in mesh.shape for n in names):
        raise ValueError(
            f"group_size={size} counts devices along axis_name={axis_name!r}, "
            "which is neither bound here nor an axis of the mesh in use "
            f"{tuple(mesh.shape)}. Use jax.set_mesh, or normalize_over."
        )
    devices = 1
    for name in names:
        devices *= mesh.shape[name]
    return devices


def _check_share(size: int, devices: int, examples: int) -> None:
    """Raises ValueError unless groups have equally many examples."""
    if examples % (devices // size) == 0:
        return
    fits = [
        n
        for n in range(1, devices + 1)
        if devices % n == 0 and examples % (devices // n) == 0
    ]
    nearest = min(fits, key=lambda n: (abs(n - size), n))
    raise ValueError(
        f"group_size={size} makes {devices // size} groups of the {devices} "
        f"devices, which do not divide {examples} examples; the nearest valid "
        f"value is {nearest}."
    )


def _uneven(size: int, devices: int, axis_name: AxisName) -> str:
    return (
        f"group_size={size} does not divide the {devices} devices along "
        f"axis_name={axis_name!r}."
    )


def _check_groups(groups: Partition, devices: int, axis_name: AxisName) -> None:
    members = sorted(i for group in groups for i in group)
    lengths = {len(group) for group in groups}
    if members != list(range(devices)) or len(lengths) != 1:
        raise ValueError(
            f"axis_index_groups={groups} must hold each of the {devices} "
            f"indices along axis_name={axis_name!r} once, in groups of "
            "equal length."
        )
