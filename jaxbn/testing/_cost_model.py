"""The time that one collective takes, from its bytes and the link."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# Latency or bandwidth, or a function of the number of devices.
Figure = float | Callable[[int], float]

#: Published peak bandwidths: bytes/s that a device sends on all its links
#: together, half of what is stated for both directions.
LINKS = {
    "nvlink3": 300e9,  # NVIDIA, NVLink: A100, 12 links, 600 GB/s in total
    "nvlink4": 450e9,  # NVIDIA, Hopper Architecture: 900 GB/s bi-directional
    "tpu_v5e": 200e9,  # Google Cloud, TPU v5e: bidirectional ICI 400 GBps
    "tpu_v5p": 600e9,  # Google Cloud, TPU v5p: bidirectional ICI 1200 GBps
}

# Bytes a device sends in a ring of n, for each byte of its result.
_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # the result is one of n parts
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
# Exponent of the number of devices in the size of the result, for an input of
# constant size.
_GROWS = {"all-gather": 1, "reduce-scatter": -1}


class Operation(NamedTuple):
    """A collective in a compiled program."""

    kind: str
    bytes: int  # of its result
    members: int  # devices that take part together
    backward: bool  # whether it runs in the backward pass


class Cost(NamedTuple):
    """Cost of the collectives in one part of a program.

    Attributes:
      count: number of collectives.
      sent: bytes that each device sends.
      seconds: time that they take, by the model of `sync_cost`.
    """

    count: int  # type: ignore[assignment]
    sent: float
    seconds: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(
            self.count + other.count,
            self.sent + other.sent,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.count - other.count,
            self.sent - other.sent,
            self.seconds - other.seconds,
        )


def cost_of(
    operation: Operation,
    compiled_for: int,
    devices: int,
    latency: Figure,
    bandwidth: Figure,
) -> Cost:
    """Returns the cost of a collective, scaled to a number of devices."""
    kind, members = operation.kind, operation.members
    size: float = operation.bytes
    if kind not in _SENT:
        raise ValueError(f"There is no formula for {kind!r}, which fn has.")
    if members == compiled_for:
        size *= (devices / compiled_for) ** _GROWS.get(kind, 0)
        members = devices
    if members > devices:
        raise ValueError(
            f"A collective joins {members} devices, and devices={devices}."
        )
    if members == 1:
        return Cost(0, 0.0, 0.0)
    wait, rate = (
        figure(members) if callable(figure) else figure
        for figure in (latency, bandwidth)
    )
    if not wait >= 0 or not rate > 0:
        raise ValueError(
            f"latency must be seconds and bandwidth positive bytes a second; "
            f"got {wait} and {rate} for {members} devices."
        )
    sent = _SENT[kind](members) * size
    return Cost(1, sent, wait + sent / rate)
