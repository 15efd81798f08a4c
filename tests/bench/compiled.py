"""python -m tests.bench.compiled: programs compiled for TPUs and GPUs.

No device is needed: JAX compiles ahead of time for hardware that is not
present. Prints the memory, bytes, kernels and collectives of the compiled
programs, and on TPUs the compiler's estimate of cycles. Nothing is run, so no
number is a measurement.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench import compiled_targets

PROGRAMS = {
    "layer": "a single layer, forward and backward",
    "net": "five 3x3 convolutions of 64 channels with norm and ReLU at 32x32",
    "resnet18": "ResNet-18 for 32x32 images",
    "resnet50": "ResNet-50 for 224x224 images",
    "train": "the step of train with configs/resnet18_cifar.py",
    "fast": "an epoch of train with configs/cifar10_94.py",
    "slice": "the step of train with ResNet-50 on many chips",
}
NORMS = ("flax", "jaxbn", "stable", "none")
LAYERS = ((256, 56, 56, 64), (256, 56, 56, 256), (1024, 32, 32, 64))
# Examples of a device; fast's are of all together.
BATCHES = {
    "net": 1024,
    "resnet18": 1024,
    "resnet50": 256,
    "train": 1024,
    "fast": 1024,
    "slice": 64,
}
QUICK = 16

EXPLANATION = """\
Numbers in parentheses are ratios to flax. Cycles are the compiler's estimate.
GB is what kernels read from main memory and write to it, per chip; XLA's own
count next to it includes on-chip memory. Kernels and collectives are counted as
often as they run, in loops with a known number of iterations too. Sums alone:
kernels that only sum an activation per channel, not fused with a convolution.
Apart: what may not run, which is all branches of conditionals and the bodies of
other loops."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, without importing JAX."""
    parser = argparse.ArgumentParser(
        "python -m tests.bench.compiled",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="programs:\n"
        + "\n".join(f"  {key:9} {text}" for key, text in PROGRAMS.items())
        + "\n\nnorms:\n"
        "  jaxbn     jaxbn.linen.BatchNorm\n"
        "  flax      flax.linen.BatchNorm, which takes E[x^2] - E[x]^2\n"
        "  stable    the same with use_fast_variance=False\n"
        "  none      scale and bias without statistics",
    )

    def some(known: Any) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            names = [name.strip() for name in text.split(",")]
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(
                        f"{name!r} is not one of {', '.join(known)}"
                    )
            return names

        return read

    for flag, known, default in (
        ("targets", compiled_targets.TARGETS, None),
        ("programs", PROGRAMS, list(PROGRAMS)),
        ("norms", NORMS, list(NORMS)),
    ):
        said = "all" if default else "those whose compiler is installed"
        parser.add_argument(
            f"--{flag}",
            type=some(known),
            default=default,
            metavar="A,B",
            help=f"{', '.join(known)}; default: {said}",
        )
    parser.add_argument(
        "--batch", type=int, help="examples per device, for all programs"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"same as --batch {QUICK}",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the results, as they arrive"
    )
    parser.add_argument(
        "--text", metavar="DIR", help="write the optimized programs to DIR"
    )
    return parser.parse_args(argv)


def builds(
    program: str, target: str, batch: int | None
) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Yields what is compiled for one of PROGRAMS: label, (norm) -> Program."""
    from tests.bench import compiled_programs, compiled_train

    mesh = compiled_targets.make_mesh(target, many=program == "slice")
    if program == "layer":
        for shape in LAYERS:
            shape = (batch or shape[0], *shape[1:])
            label = f"layer {'x'.join(map(str, shape))} x1"
            yield (
                label,
                lambda norm, s=shape: compiled_programs.layer(mesh, norm, s),
            )
        return
    build = {
        "net": compiled_programs.net,
        "resnet18": compiled_programs.resnet18,
        "resnet50": compiled_programs.resnet50,
        "train": compiled_train.resnet18_step,
        "fast": compiled_train.fast_epoch,
        "slice": compiled_train.resnet50_step,
    }[program]
    size = batch or BATCHES[program]
    label = f"{program}, {size} examples{'' if program == 'fast' else ' each'}"
    yield f"{label} x{mesh.size}", lambda norm: build(mesh, norm, size)


def measure(
    target: str, label: str, norm: str, program: Any, folder: str | None
) -> dict[str, Any]:
    """Compiles a program and returns what is known of it."""
    from tests.bench import compiled_hlo, compiled_text
    from tests.bench.measure import cost

    start = time.perf_counter()
    row: dict[str, Any] = {"target": target, "program": label, "norm": norm}
    try:
        compiled = program(norm).compile()
    except Exception as error:  # such as a program that does not fit
        return row | {"error": (str(error) or repr(error)).splitlines()[0]}
    text = compiled.as_text()
    if folder:
        name = "-".join((target, *label.replace(",", "").split(), norm))
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        pathlib.Path(folder, f"{name}.txt").write_text(text)
    on_tpu = compiled_targets.TARGETS[target].platform == "tpu"
    module = compiled_hlo.parse(text, main=(0,) if on_tpu else (0, 1))
    kernels = compiled_text.read_kernels(module)
    ordinary, apart = (
        compiled_text.work(kernels, ordinary=which)._asdict()
        for which in (True, False)
    )
    return row | {
        "ordinary": ordinary,
        "apart": apart,
        "decisions": compiled_text.decisions(module),
        "xla_bytes": cost(compiled) if on_tpu else None,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "traffic": compiled_text.traffic(kernels),
        "sums_alone": compiled_text.work(
            # GPUs take sums in two steps, in kernels of many kinds.
            compiled_text.sums_alone(kernels) if on_tpu else [],
            ordinary=True,
        )._asdict(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Prints a table for every program on every target; returns the status."""
    args = arguments(argv)
    names = list(compiled_targets.TARGETS)
    absent = {name: compiled_targets.missing(name) for name in names}
    if args.targets is None:
        args.targets = [name for name in names if not absent[name]]
        if not args.targets:
            args.targets = names
    for name in args.targets:
        if absent[name]:
            print(absent[name], file=sys.stderr)
            return 1
    compiled_targets.set_environment(args.targets)
    from tests.bench import compiled_table

    batch = args.batch or (QUICK if args.quick else None)
    rows: list[dict[str, Any]] = []
    print(compiled_table.header() + "\n\n" + EXPLANATION, flush=True)
    for target in args.targets:
        for program in args.programs:
            for label, build in builds(program, target, batch):
                here = []
                for norm in args.norms:
                    print(f"{target}: {label}, {norm}", file=sys.stderr)
                    here.append(measure(target, label, norm, build, args.text))
                    rows.append(here[-1])
                    if args.json:
                        pathlib.Path(args.json).write_text(
                            json.dumps(rows, indent=1)
                        )
                print("\n" + compiled_table.table(here), end="", flush=True)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
