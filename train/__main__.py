# ruff: noqa: E402
"""Trains a ResNet: python -m train [--config FILE] [--workdir DIR].

Override any field of the config with --config.batch_size=256. For multi-host
training, run the same command on every host, with a workdir that all of them
share. Unless SLURM, Open MPI, Kubernetes or Cloud TPU describes the cluster,
add --coordinator=HOST:PORT --num_processes=N --process_id=I.

Exit codes: 0 on success; 1 on an error, reported in one line; 75 if stopped by
SIGTERM, or because another process was lost: rerun the same command with the
same --workdir to resume; 130 if interrupted by Ctrl-C, which can be resumed as
well.
"""

from __future__ import annotations

from train import clock, signals

if __name__ == "__main__":
    signals.listen()  # before the imports, which take seconds
    clock.start("importing")

import functools
import logging as standard_logging
import math
import sys
import traceback
import warnings

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from train import Stopped, UserError, exits, output, watchdog
from train import flags as command_line
from train.cpu_devices import simulate_cpu_devices

_log = exits.ErrorLog()


def _define() -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; if it holds one already, training resumes. "
        "Default: runs/CONFIG-TIME, a new run.",
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0. Default: detected from SLURM, Open MPI, "
        "Kubernetes or Cloud TPU; otherwise a single process.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "Number of processes, with --coordinator."
    )
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
    flags.DEFINE_float(
        "stall_limit",
        1800.0,
        "With several processes, seconds without progress after which each of "
        "them exits with code 75, because one hangs; 0 disables.",
    )
    flags.DEFINE_string(
        "wandb",
        None,
        "Project of Weights & Biases to log to as well; needs pip install "
        "wandb. WANDB_MODE=offline logs to the workdir alone.",
    )
    flags.register_validator(
        "wandb",
        lambda project: project != "",
        message="must be the name of a project",
    )
    flags.register_validator(
        "stall_limit",
        lambda seconds: 0 <= seconds < math.inf,
        message="must be finite and not negative, in seconds",
    )


_parse = functools.partial(
    command_line.parse,
    doc=__doc__,
    default="digits.py",
    define=_define,
)


def main(config: ConfigDict) -> None:
    """Trains and prints a one-line result."""
    simulate_cpu_devices(config.cpu_devices)
    # Errors in threads are raised in the main thread and reported once.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    warnings.formatwarning = lambda message, *_, **__: f"train: {message}\n"
    # Not before the number of devices is set.
    from train import distributed, loop, processes, seeds, wandb_run
    from train.summary import result, versions

    given = flags.FLAGS
    workdir = command_line.workdir()
    distributed.initialize(
        given.coordinator,
        given.num_processes,
        given.process_id,
        before_connecting=_capture_output,
    )
    if jax.distributed.is_initialized():
        _log.connected()
        signals.forward_to_jax()
        watchdog.start(given.stall_limit, _log)
        if not given.workdir and jax.process_count() > 1:
            raise UserError(
                "With several processes, set --workdir to a shared directory."
            )
    processes.check_consistent(config, versions())
    _log.use(workdir)
    with processes.sync_errors():
        if given.wandb is not None and processes.is_main():
            wandb_run.require()
    train = seeds.train if config.num_seeds > 1 else loop.train
    summary = train(config, workdir, wandb=given.wandb)
    if not processes.is_main():
        return
    output.say(f"{result(summary)}; results in {workdir}")


def _capture_output(process: int) -> None:
    """Captures the output of libraries that abort if another process dies."""
    global _log
    _log = exits.ErrorLog(process)
    _log.capture()


def _run() -> int:
    """Returns the exit code; errors are reported in one line."""
    clock.end_line()  # the imports are done
    try:
        app.run(main, flags_parser=_parse)
    except UserError as user_error:
        from train import processes

        # All processes exit; the coordinator must be the last.
        agreed = isinstance(user_error, processes.SharedUserError)
        _log.finish(1)
        last = jax.distributed.shutdown if agreed else None
        exits.exit_now(str(user_error), 1, last=last)
    except Stopped as stopped:
        print(f"train: {stopped}", file=sys.stderr, flush=True)
        return stopped.code
    except SystemExit as end:  # raised by app.run on success
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
