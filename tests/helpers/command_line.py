"""Programs of train/, started as a user starts them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments, module="train", cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        # Compiles less, and nothing twice; see conftest.py.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
