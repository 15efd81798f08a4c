"""python -m tests.bench.gpu: measures batch norm on an accelerator.

Prints these sections, the most important first:

- exact: whether the layers are right on the device, against float64;
- copy: the memory bandwidth, with which the layers are compared;
- norm: forward, and forward and backward, of jaxbn, flax, haiku, equinox and
  PyTorch: the time, and how it compares with the minimum of 3 passes over x, or
  8 with backward, at the speed of a copy of the same size;
- steps: images per second of training steps of ResNet-50 and ResNet-18, and
  their memory; also with jaxbn.remat.policy(), and without the pass that jaxbn
  takes only if sums cancel;
- loop: steps of ResNet-20 with batch size 128 in one program, in the same way;
- fused: the layer with a ReLU, and with an addition and a ReLU;
- trace: the fraction of a step's device time spent in normalization;
- batch: the largest batch that fits into memory.

If a section fails, the error is printed and the others still run. After
--seconds, no new measurement is started. JAX_COMPILATION_CACHE_DIR saves the
time to compile in later calls.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Before JAX starts: PyTorch needs memory on the same card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")


from tests.bench import (
    __main__,
    gpu_exact,
    gpu_layers,
    gpu_nets,
    gpu_run,
    gpu_steps,
    torch_peer,
)

# Each with its share of the time; what one leaves over, the later ones have.
SECTIONS: dict[str, tuple[Callable[[Any], Iterator[dict]], float]] = {
    "exact": (gpu_exact.section, 2),
    "copy": (gpu_layers.copy_speed, 1),
    "norm": (gpu_layers.alone, 6),
    "steps": (gpu_steps.speed, 10),
    "loop": (gpu_steps.loop, 3),
    "fused": (gpu_layers.fused, 4),
    "trace": (gpu_steps.kernels, 4),
    "batch": (gpu_steps.largest_batch, 6),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[dict]]:
    """Runs the chosen sections; returns and prints their rows."""
    given = _parse(arguments)
    result: dict[str, Any] = {"header": __main__.header()}
    result["header"]["command"] = "python -m tests.bench.gpu"
    for key, value in result["header"].items():
        _print(f"- {key}: {value}")
    _print(f"- {torch_peer.why_not() or 'PyTorch is measured too'}")
    end = time.perf_counter() + given.seconds
    left = dict.fromkeys(given.only or SECTIONS)
    for name in list(left):
        section, weight = SECTIONS[name]
        rest = sum(SECTIONS[other][1] for other in left)
        del left[name]
        seconds = max(end - time.perf_counter(), 0) * weight / rest
        _print(f"\n### {name}: {section.__doc__.partition(chr(10))[0]}\n")
        rows = result[name] = []
        start = time.perf_counter()
        try:
            run = gpu_run.Run(
                quick=given.quick, seconds=seconds, trace=given.trace
            )
            if given.network:
                run.networks = [
                    n for n in run.networks if n.kind in given.network
                ]
            for row in section(run):
                _show(row, rows[-1] if rows else {})
                rows.append(row)
        except Exception as error:
            rows.append({"note": f"{name} failed: {gpu_run.short(error)}"})
            _show(rows[-1], {})
        _print(f"\n({time.perf_counter() - start:.0f} s)")
        if given.json:  # now, lest the whole run is cut off
            text = json.dumps(result, indent=1, default=float)
            pathlib.Path(given.json).write_text(text)
    return result


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(SECTIONS),
        help="a section, may be repeated; default: all",
    )
    parser.add_argument(
        "--network",
        action="append",
        choices=[network.kind for network in gpu_nets.LARGE],
        help="a network, may be repeated; default: all",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=540,
        help="for all sections together; default %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--json", metavar="FILE", help="also write the rows")
    parser.add_argument(
        "--trace",
        metavar="DIR",
        help="write the profiles of section trace, for xprof or TensorBoard, "
        "and the programs",
    )
    return parser.parse_args(arguments)


def _show(row: dict, before: dict) -> None:
    """Prints a row of a Markdown table, and its head where columns change."""
    if "note" in row:
        _print(f"\n{row['note']}\n")
        return
    if list(row) != list(before):
        _print("| " + " | ".join(row) + " |")
        _print("| " + " | ".join(["---"] * len(row)) + " |")
    _print("| " + " | ".join(map(_cell, row.values())) + " |")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
