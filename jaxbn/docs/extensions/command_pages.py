"""Describes the commands of the checkout in Markdown, by their --help."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]
_BENCHMARKS = ("tests.bench", "tests.bench.compiled", "tests.bench.gpu")


def programs() -> list[str]:
    """Returns the modules that python -m runs: train first."""
    paths = [*ROOT.glob("train/*.py"), *ROOT.glob("train/*/*.py")]
    found = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if '__name__ == "__main__"' in path.read_text()
    ]
    return [
        *sorted(name.removesuffix(".__main__") for name in found),
        *_BENCHMARKS,
    ]


def help_of(program: str) -> str:
    """Returns what --help prints, without the fields of configs.

    Raises:
      RuntimeError: the program cannot be started.
    """
    environment = {
        **os.environ,
        "COLUMNS": "80",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"python -m {program} --help failed; pip install -e '.[docs]' has "
            f"what it needs.\n{done.stderr}"
        )
    return done.stdout.partition("\nConfig fields and their defaults:")[0]


def commands() -> str:
    """Returns a section for each command."""
    names = programs()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        helps = list(pool.map(help_of, names))
    return "\n\n".join(
        f"### `python -m {name}`\n\n```text\n{text.strip()}\n```"
        for name, text in zip(names, helps)
    )
