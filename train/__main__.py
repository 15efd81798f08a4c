"""Trains a ResNet: python -m train [--config FILE] [--workdir DIR].

Any field of the config can be set: --config.batch_size=256.
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from train import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _parse(argv: Sequence[str]) -> ConfigDict:
    """Returns the config that the flags ask for; --workdir stays a flag.

    ml_collections reads the config file and its overrides already where the
    flag is defined, and keeps what went wrong until the value is asked for:
    every step of it can raise.
    """
    try:
        config_flags.DEFINE_config_file(
            "config",
            str(ROOT / "configs" / "digits.py"),
            "File that defines get_config().",
        )
        flags.DEFINE_string(
            "workdir",
            None,
            "Where the run is kept; the same command goes on with what is "
            "there. Default: runs/CONFIG-TIME, a new run.",
        )
        rest = flags.FLAGS(argv)
        config = flags.FLAGS.config.lock()
    except (flags.Error, AttributeError, OSError, TypeError) as error:
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(
            f"Unexpected argument {rest[1]!r}; flags begin with --."
        )
    return config


def _one_line(error: Exception) -> str:
    """Words what ml_collections and absl report."""
    message = str(error)
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    if near:
        return f"There is no config.{near[2]}; did you mean config.{near[1]}?"
    if isinstance(error, AttributeError):
        name = message.strip("'\"")
        return f"There is no config.{name}; configs/defaults.py has all fields."
    if isinstance(error, OSError):
        name = flags.FLAGS["config"].config_filename
        if pathlib.Path(name).exists():
            raise error  # a mistake inside the file: show where
        known = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
        return f"There is no file {name}; configs/ holds {', '.join(known)}."
    return " ".join(message.split())


def _workdir() -> pathlib.Path:
    if flags.FLAGS.workdir:
        return pathlib.Path(flags.FLAGS.workdir)
    name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
    return pathlib.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def main(config: ConfigDict) -> None:
    """Trains, and prints the result in one line."""
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    logging.set_verbosity(logging.ERROR)
    from train import loop  # once the number of devices is set

    workdir = _workdir()
    summary = loop.train(config, workdir)
    print(
        f"test accuracy {summary['test_accuracy']:.2%} after "
        f"{summary['epochs']} epochs ({summary['steps']:,} steps) in "
        f"{summary['seconds']:.0f} s; results are in {workdir}"
    )


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse)
    except UserError as user_error:
        sys.exit(f"train: {user_error}")
