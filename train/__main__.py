"""Trains a ResNet: python -m train [--config FILE] [--workdir DIR].

Any field of the config can be set: --config.batch_size=256. On several hosts
the same command is given on each; where no SLURM, Open MPI, Kubernetes or
Cloud TPU says who they are, with --coordinator=HOST:PORT --num_processes=N
--process_id=I. The workdir must then be one that all of them share.

Exits with 0 when done, 75 when stopped and saved (give the same command again
to go on), and 1 when something is wrong.
"""

from __future__ import annotations

import logging as standard_logging
import os
import pathlib
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from train import RESUME, Stopped, UserError

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
        flags.DEFINE_string(
            "coordinator",
            None,
            "HOST:PORT of process 0. Without it, what SLURM, Open MPI, "
            "Kubernetes or a Cloud TPU say; else one process.",
        )
        flags.DEFINE_integer(
            "num_processes", None, "Processes of the run, with --coordinator."
        )
        flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
        if {"--help", "-h", "-help"} & {*argv}:
            _help()
        rest = flags.FLAGS(argv)
        config = flags.FLAGS.config.lock()
    except (flags.Error, AttributeError, OSError, TypeError) as error:
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(
            f"Unexpected argument {rest[1]!r}; flags begin with --."
        )
    return config


def _help() -> NoReturn:
    """Prints what there is to say, and the file of all fields as it stands."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    print(f"{__doc__}\nFlags:\n")
    for flag in own:
        text = textwrap.fill(
            f"--{flag.name}: {flag.help}", 78, subsequent_indent="    "
        )
        print(textwrap.indent(text, "  "))
    body = (ROOT / "configs" / "defaults.py").read_text()
    fields = body.partition("config = ConfigDict()\n")[2]
    fields = fields.partition("    return config")[0].strip("\n")
    kept = (line for line in fields.splitlines() if "ConfigDict()" not in line)
    print("\nFields, with the values that a config begins with:\n")
    print(
        re.sub(r"^(\s*)config\.", r"\1--config.", "\n".join(kept), flags=re.M)
    )
    print(f"\nIn configs/: {_configs()}. Each opens with its command.")
    sys.exit(0)


def _configs() -> str:
    paths = sorted((ROOT / "configs").glob("*.py"))
    return ", ".join(p.name for p in paths if "def get_config" in p.read_text())


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
        name = _config_file()
        if pathlib.Path(name).exists():
            raise error  # a mistake inside the file: show where
        return f"There is no file {name}; configs/ holds {_configs()}."
    said = re.search(r"\nValueError: (configs/.*)", message)
    if said:  # get_config(), of what stands behind the colon
        return said[1]
    return " ".join(message.split())


def _config_file() -> str:
    """The file that --config names, without what stands behind the colon."""
    given = [a for a in sys.argv[1:] if re.match("--?config(=|$)", a)]
    at = sys.argv.index(given[-1])
    name = given[-1].partition("=")[2] or sys.argv[at + 1]
    return name.partition(":")[0]


def _workdir() -> pathlib.Path:
    if flags.FLAGS.workdir:
        return pathlib.Path(flags.FLAGS.workdir)
    file, _, argument = flags.FLAGS["config"].config_filename.partition(":")
    name = "-".join([pathlib.Path(file).stem, *re.findall(r"[\w-]+", argument)])
    return pathlib.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def main(config: ConfigDict) -> None:
    """Trains, and prints the result in one line."""
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    # What fails in a thread is raised, and said once.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    # Once the number of devices is set.
    from train import loop, seeds, topology

    given = flags.FLAGS
    topology.start(given.coordinator, given.num_processes, given.process_id)
    workdir = _workdir()
    if jax.process_count() > 1 and not given.workdir:
        raise UserError(
            "Several processes need one --workdir that all of them share."
        )
    several = config.seeds > 1
    summary = (seeds if several else loop).train(config, workdir)
    if not topology.is_main():
        return
    deviation = ""
    if several:
        deviation = (
            f" ± {summary['test_accuracy_deviation']:.2%} over "
            f"{config.seeds} seeds"
        )
    print(
        f"test accuracy {summary['test_accuracy']:.2%}{deviation} after "
        f"{summary['epochs']} epochs ({summary['steps']:,} steps) in "
        f"{summary['seconds']:.0f} s; results are in {workdir}"
    )


# How collectives fail where a process at the other end is gone.
_LOST = re.compile(
    "closed by peer|reset by peer|coordination service|heartbeat"
)


def _leave(message: str, code: int) -> NoReturn:
    """Ends the process at once.

    Other processes are in a collective that this one will never join, and end
    once they miss its heartbeat; a clean exit would wait for them. And what
    failed in a thread would be reported again after the message.
    """
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse)
    except UserError as user_error:
        _leave(f"train: {user_error}", 1)
    except Stopped as stopped:
        print(f"train: {stopped}", file=sys.stderr, flush=True)
        sys.exit(RESUME)
    except Exception as unexpected:
        if _LOST.search(str(unexpected)):
            _leave(
                "train: another task died or left: the connection to it is "
                "lost. Its own output says why; the same command on all hosts "
                "goes on from the last checkpoint.",
                RESUME,
            )
        _leave(traceback.format_exc(), 1)
