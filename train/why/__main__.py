"""Tests published claims about batch norm: python -m train.why [NAME ...].

Trains small networks with and without batch norm, with several seeds. Writes to
DIR: report.md, with the claim and the results of each experiment, and for each
NAME.png, its figure, and NAME.json, its numbers.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import pathlib
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence

from train import UserError
from train.files import as_user_error
from train.why import EXPERIMENTS
from train.why.data import NAMES, Settings
from train.why.experiment import Experiment
from train.why.report import write, write_page


def main(arguments: Sequence[str]) -> None:
    given = _parser().parse_args(arguments)
    names = _known(given.names)
    if given.list:
        for name in names:
            lines = textwrap.wrap(experiment(name).claim, 66)
            print(f"{name:<12}" + f"\n{'':<12}".join(lines))
        return
    if given.seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {given.seeds}.")
    seeds = tuple(range(given.seeds))
    settings = Settings(given.data, given.data_dir, seeds, given.quick)
    default = pathlib.Path("runs", time.strftime("why-%Y%m%d-%H%M%S"))
    run(names, settings, given.out or default)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m train.why", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="experiment; default: all")
    add("--list", action="store_true", help="list the experiments and claims")
    out = "folder for the report; default runs/why-TIME"
    add("--out", type=pathlib.Path, metavar="DIR", help=out)
    data = f"{' or '.join(NAMES)}; default digits"
    add("--data", default="digits", metavar="NAME", help=data)
    add("--data_dir", metavar="DIR", help="TFDS data directory, for cifar10")
    add("--seeds", type=int, default=3, metavar="N", help="default 3")
    add("--quick", action="store_true", help="smaller networks, fewer steps")
    return parser


def _known(names: Sequence[str]) -> list[str]:
    """Returns names, or all without any; an unknown one is a UserError."""
    for name in names:
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(name.lower(), EXPERIMENTS, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            known = ", ".join(EXPERIMENTS)
            raise UserError(
                f"Unknown experiment {name!r}. {hint}There are {known}."
            )
    return list(dict.fromkeys(names)) or list(EXPERIMENTS)


def experiment(name: str) -> Experiment:
    """Imports one of EXPERIMENTS."""
    return importlib.import_module(f"train.why.{name}").EXPERIMENT


def run(names: Sequence[str], settings: Settings, folder: pathlib.Path) -> None:
    """Runs experiments; prints and writes the results.

    If one fails, the others still run.

    Raises:
      UserError: the folder cannot be written, or an experiment failed, once
        all have run.
    """
    with as_user_error(f"--out={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    findings, failed = [], []
    for name in names:
        started = time.monotonic()
        try:
            finding = experiment(name).run(settings)
            write(finding, folder, settings=settings)
            findings.append(finding)
            write_page(findings, folder, settings)
            sentences = finding.measured
        except Exception as error:
            failed.append(name)
            sentences = [f"failed: {error}"]
            if not isinstance(error, UserError):
                traceback.print_exc()
                sentences = [f"failed: {type(error).__name__}, as shown above"]
        print(f"{name} ({time.monotonic() - started:.1f} s)")
        for sentence in sentences:
            print(textwrap.fill(f"- {sentence}", 80, subsequent_indent="  "))
        sys.stdout.flush()
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} experiments failed: "
            f"{', '.join(failed)}. The results of the others are in {folder}."
        )
    print(f"The report is {folder / 'report.md'}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as user_error:
        sys.exit(f"train.why: {user_error}")
