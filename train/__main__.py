"""Trains a ResNet: python -m train [--config FILE] [--workdir DIR].

Any field of the config can be set: --config.batch_size=256. On several hosts
the same command is given on each; where no SLURM, Open MPI, Kubernetes or
Cloud TPU says who they are, with --coordinator=HOST:PORT --num_processes=N
--process_id=I. The workdir must then be one that all of them share.

Exits with 0 when done, 75 when stopped and saved (give the same command again
to go on), and 1 when something is wrong.
"""

from __future__ import annotations

import functools
import logging as standard_logging
import os
import re
import sys
import traceback
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from configs import defaults
from train import RESUME, Stopped, UserError, output
from train import flags as command_line


def _define() -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run is kept; the same command goes on with what is there. "
        "Default: runs/CONFIG-TIME, a new run.",
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0. Without it, what SLURM, Open MPI, Kubernetes "
        "or a Cloud TPU say; else one process.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "Processes of the run, with --coordinator."
    )
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")


_parse = functools.partial(
    command_line.parse,
    doc=__doc__,
    fields=defaults,
    default="digits.py",
    define=_define,
)


def main(config: ConfigDict) -> None:
    """Trains, and prints the result in one line."""
    command_line.simulate(config.cpu_devices)
    # What fails in a thread is raised, and said once.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    # Once the number of devices is set.
    from train import loop, seeds, topology

    given = flags.FLAGS
    topology.start(given.coordinator, given.num_processes, given.process_id)
    workdir = command_line.workdir()
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
    output.say(
        f"test accuracy {summary['test_accuracy']:.2%}{deviation} after "
        f"{summary['epochs']} epochs ({summary['steps']:,} steps) in "
        f"{summary['seconds']:.0f} s; results are in {workdir}"
    )


# How collectives fail where a process at the other end is gone.
_LOST = re.compile(
    "closed by peer|reset by peer|[Bb]roken pipe|gloo/transport|"
    "coordination service|heartbeat"
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
