"""Simulated CPU devices."""

from __future__ import annotations

import os

import jax

from train.allocator import keep_freed_memory


def simulate_cpu_devices(devices: int) -> None:
    """Simulates CPU devices; call before the first use of any device."""
    keep_freed_memory()
    # With fewer threads than twice the number of devices, collectives
    # deadlock. XLA reads this when it starts.
    threads = max(int(os.environ["NPROC"]), 2 * devices)
    os.environ["NPROC"] = str(threads)
    jax.config.update("jax_num_cpu_devices", devices)
