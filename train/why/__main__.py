"""Measures why batch norm works: python -m train.why [NAME ...].

Runs the experiments, all without a name, with and without batch norm, over
several seeds. Each writes DIR/NAME.png, a picture whose caption holds what was
published beside what was measured, and DIR/NAME.json, its numbers.
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
from train.why.report import write


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
    add("names", nargs="*", metavar="NAME", help="experiments; all without")
    add("--list", action="store_true", help="lists them and what they test")
    add("--out", type=pathlib.Path, help="for the pictures; runs/why-TIME")
    add("--data", default="digits", metavar="|".join(NAMES), help="to train on")
    add("--data_dir", help="where CIFAR-10 is prepared; as TFDS without")
    add("--seeds", type=int, default=3, help="repetitions; 3 without")
    add("--quick", action="store_true", help="smaller nets and fewer steps")
    return parser


def _known(names: Sequence[str]) -> list[str]:
    """Returns names, or all there are; one that is unknown is a UserError."""
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
    """Runs experiments and writes what they find; a line for each.

    One that fails does not keep the others from running.

    Raises:
      UserError: the folder cannot be written, or an experiment failed, once
        all have run.
    """
    with as_user_error(f"--out={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        started = time.monotonic()
        try:
            finding = experiment(name).run(settings)
            write(finding, folder, settings=settings)
            outcome = finding.measured
        except Exception as error:
            failed.append(name)
            outcome = f"failed: {error}"
            if not isinstance(error, UserError):
                traceback.print_exc()
                outcome = f"failed: {type(error).__name__}, as shown above"
        seconds = time.monotonic() - started
        print(f"{name:<11} {seconds:5.1f} s  {outcome}", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} experiments failed: "
            f"{', '.join(failed)}. What the others found is in {folder}."
        )
    print(f"The pictures are in {folder}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as user_error:
        sys.exit(f"train.why: {user_error}")
