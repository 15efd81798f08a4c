"""What all seeds of a run share: data, programs and their inputs."""

from __future__ import annotations

from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from train import clock, processes
from train.checkpoint import Progress
from train.experiment import Experiment, build_experiment
from train.pipeline import Pipeline, make_pipeline
from train.programs import Programs


class Session(NamedTuple):
    """The components that a run is trained with."""

    experiment: Experiment
    pipeline: Pipeline
    programs: Programs

    def dispatches(self, progress: Progress) -> int:
        """Returns the number of dispatches of training from a position on."""
        left = self.experiment.steps.left(progress.epoch, progress.batch)
        return sum(len(self.pipeline.train_sizes(steps)) for _, steps in left)


def make_session(config: ConfigDict) -> Session:
    """Reads the data; compiles nothing.

    Raises:
      UserError: the config is invalid, with what to change.
    """
    with clock.show(f"reading {config.dataset}", processes.is_main()):
        experiment = build_experiment(config)
        pipeline = make_pipeline(
            config, experiment.dataset, experiment.topology
        )
    return Session(experiment, pipeline, Programs(experiment, pipeline))


def prepare(session: Session, *, epoch: int, batch: int) -> None:
    """Compiles what a run needs from a position on.

    With the data on an accelerator, also calls each program once, so that runs
    are timed without the setup of a first call.
    """
    programs = session.programs
    fresh = programs.compile(epoch, batch)
    on_device = session.pipeline.on_device
    if fresh and on_device and jax.default_backend() != "cpu":
        programs.warm_up(epoch, batch)
