"""python -m tests.bench: compares jaxbn with other libraries on CPUs.

Prints Markdown tables. All libraries run in one process, in turns (A B C,
A B C, ...); ratios are taken within a turn. The machine should be idle.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import sys
import time

import jax

from tests.bench import layers, sections, tables


def processor() -> str:
    """Returns the name of the host's processor."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def header() -> dict:
    """Returns where, when and with what the numbers were taken."""
    device = jax.devices()[0]
    found = {
        "command": "python -m tests.bench " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": f"{device.device_kind} ({device.platform})",
        "processor": f"{processor()}, {os.cpu_count()} cores, "
        f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "versions": layers.versions(),
    }
    if hasattr(os, "getloadavg"):
        found["load before the start"] = round(os.getloadavg()[0], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.bench", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "section",
        nargs="*",
        help=f"{', '.join(sections.SECTIONS)}; default: all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, few repetitions"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers")
    arguments = parser.parse_args()
    chosen = arguments.section or list(sections.SECTIONS)
    for name in chosen:
        if name not in sections.SECTIONS:
            parser.error(
                f"{name!r} is not one of {', '.join(sections.SECTIONS)}."
            )

    names, missing = layers.installed()
    result = {"header": header()}
    print("## jaxbn and other libraries\n")
    for key, value in result["header"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"- {key}: {value}")
    for name in missing:
        print(f"- {name} is not installed and left out")
    start = time.perf_counter()
    for name in chosen:
        result[name] = sections.SECTIONS[name](names, arguments.quick)
        print("\n" + tables.TABLES[name](result[name]), end="", flush=True)
    print(f"\nTook {time.perf_counter() - start:.0f} s.")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
