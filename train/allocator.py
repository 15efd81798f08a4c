"""Settings of the C library's allocator for XLA on CPUs."""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h in glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Lets large freed buffers be reused instead of returned to the system.

    XLA on CPUs allocates the buffers of a program at each call. By default
    glibc maps those above 32 MB and unmaps them when freed, so that the kernel
    zeroes them page by page at each step: a fifth of the CPU time of training
    ResNet-20. In return the process keeps the memory of its peak.

    Call before threads allocate. Without effect on other C libraries, and if
    the environment variables of glibc set a threshold.

    Source: mallopt(3).
    """
    names = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)  # bytes
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
