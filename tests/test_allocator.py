"""Large buffers are reused by the allocator."""

import ctypes
import os
import pathlib
import subprocess
import sys

import pytest

from train import allocator

# Page faults of filling a buffer of 64 MB for the third time.
FAULTS = """
import resource
import numpy as np
from train.allocator import keep_freed_memory
{call}
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(1 << 26, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)],
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_freed_memory_is_reused():
    plain = faults("")
    if plain < 10:
        pytest.skip("this allocator keeps memory by itself")
    assert faults("keep_freed_memory()") < plain / 10
    given = faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1000000")
    assert given > plain / 2


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    allocator.keep_freed_memory()
