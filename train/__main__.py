# ruff: noqa: E402
"""Trains a ResNet: python -m train [--config FILE] [--workdir DIR].

Any field of the config can be set: --config.batch_size=256. On several hosts
the same command is given on each; where no SLURM, Open MPI, Kubernetes or
Cloud TPU says who they are, with --coordinator=HOST:PORT --num_processes=N
--process_id=I. The workdir must then be one that all of them share.

Exits with 0 when done; 1 when something is wrong, in one line; 75 when stopped
by SIGTERM, or because another process was lost: give the same command again to
go on; 130 when stopped by Ctrl-C, which the same command goes on from too.
"""

from __future__ import annotations

from train import signals

if __name__ == "__main__":
    signals.listen()  # before the imports, which take seconds

import functools
import logging as standard_logging
import math
import sys
import traceback
import warnings

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from configs import defaults
from train import Stopped, UserError, exits, output, watchdog
from train import flags as command_line

_log = exits.ErrorLog()


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
    flags.DEFINE_float(
        "stall_limit",
        1800.0,
        "Seconds without progress after which each of several processes ends "
        "with code 75, because one of them hangs; 0 waits for ever.",
    )
    flags.register_validator(
        "stall_limit",
        lambda seconds: 0 <= seconds < math.inf,
        message="seconds, from 0 on",
    )


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
    warnings.formatwarning = lambda message, *_, **__: f"train: {message}\n"
    # Not before the number of devices is set.
    from train import distributed, loop, processes, seeds
    from train.summary import versions

    given = flags.FLAGS
    workdir = command_line.workdir()
    distributed.initialize(
        given.coordinator,
        given.num_processes,
        given.process_id,
        before_connecting=_several,
    )
    if jax.distributed.is_initialized():
        _log.connected()
        signals.forward_to_jax()
        watchdog.start(given.stall_limit, _log)
        if not given.workdir and jax.process_count() > 1:
            raise UserError(
                "Several processes need one --workdir that all of them share."
            )
    processes.agree(config, versions())
    _log.use(workdir)
    several = config.seeds > 1
    summary = (seeds if several else loop).train(config, workdir)
    if not processes.is_main():
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


def _several(process: int) -> None:
    """Gets ready for libraries that abort where another process dies."""
    global _log
    _log = exits.ErrorLog(process)
    _log.capture()


def _run() -> int:
    """Returns the exit code; what went wrong is said in one line."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as user_error:
        from train import processes

        # All leave, and the coordinator must not do so before the others.
        agreed = isinstance(user_error, processes.Agreed)
        _log.finish(1)
        last = jax.distributed.shutdown if agreed else None
        exits.exit_now(str(user_error), 1, last=last)
    except Stopped as stopped:
        print(f"train: {stopped}", file=sys.stderr, flush=True)
        return stopped.code
    except SystemExit as end:  # of app.run, where all went well
        return end.code or 0
    except Exception as unexpected:
        from train import processes

        if processes.is_lost(unexpected):
            _log.lost("".join(traceback.format_exception(unexpected)))
        _log.unexpected(unexpected)
    return 0


if __name__ == "__main__":
    code = _run()
    _log.finish(code)
    sys.exit(code)
