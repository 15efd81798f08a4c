"""Trains a model from a config, with results in a workdir."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from train import clock, lock, networks, processes
from train.checkpoint import Checkpoints, Progress
from train.checkpoint_errors import with_resume_hint
from train.duration import tested_epochs
from train.epoch import EpochRunner
from train.files import write_json
from train.preprocessing import write_preprocessing
from train.report import NullReport, Report
from train.session import Session, make_session, prepare
from train.signals import Interrupt
from train.summary import headline, summarize
from train.timing import Timer
from train.trace import Trace
from train.weight_average import evaluate_average
from train.workdir import check_name, open_workdir, read_summary


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    session: Session | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains a model and returns the contents of summary.json.

    A workdir with the same config is resumed from its last checkpoint.

    Args:
      config: config of the run.
      workdir: directory of the run.
      session: result of `make_session` for a config that differs only in the
        seed; None makes one.
      **options: further arguments of `Report`.

    Raises:
      UserError: the config is invalid, with what to change.
      Stopped: a signal was received; the state is saved.
    """
    started = time.monotonic()
    check_name(workdir)
    session = session or make_session(config)
    with lock.locked(workdir):
        with processes.sync_errors():
            if processes.is_main():
                open_workdir(workdir, config)
                write_preprocessing(workdir, session.experiment)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return _train(
                config, workdir, session, checkpoints, started, options
            )


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    session: Session,
    checkpoints: Checkpoints,
    started: float,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Trains in a workdir that is locked."""
    main, steps = processes.is_main(), session.experiment.steps
    with clock.show("reading checkpoints", main):
        found = checkpoints.restore(session.programs.abstract_state)
    state, progress = found or (None, Progress())
    done = steps.before(progress.epoch, progress.batch)
    if found:
        summary = processes.broadcast_from_main(lambda: read_summary(workdir))
        if done == steps.total and summary:
            return summary
    timer = Timer()
    kind = Report if main else NullReport
    profile = config.profile and main
    with (
        kind(
            workdir,
            tested=tested_epochs(config),
            done=progress.epoch,
            images=steps.total * config.batch_size,
            images_done=done * config.batch_size,
            step=done,
            title=f"{networks.title(config)} on {config.dataset}",
            **options,
        ) as report,
        Interrupt(jax.process_count()) as interrupt,
        Trace(
            workdir / "profile" if profile else None,
            report.say,
            session.dispatches(progress) if profile else 0,
        ) as trace,
    ):
        report.say(headline(config, session, progress))
        with (
            report.clock("compiling", done="compiled"),
            timer.measure("compile"),
        ):
            prepare(session, epoch=progress.epoch, batch=progress.batch)
        runner = EpochRunner(
            config, session, report, checkpoints, timer, interrupt, trace
        )
        if state is None:
            with timer.measure("initialize"):
                state = session.programs.init()(config.seed)
        state = runner.run(state, progress)
        average = {}
        if state.average is not None:
            average = evaluate_average(
                config, session.experiment, state, runner.test
            )
        report.say(f"time: {timer}")

    def summary() -> dict[str, Any]:
        """Runs in the main process, which has the records."""
        made = summarize(report.records, session, timer) | average
        if not found:  # of a resumed run only the last part was timed
            made["training_seconds"] = round(runner.seconds, 4)
            made["seconds"] = round(time.monotonic() - started, 1)
        path = workdir / "summary.json"
        with with_resume_hint(path, lambda: checkpoints.newest):
            write_json(path, made)
        return made

    return processes.broadcast_from_main(summary)
