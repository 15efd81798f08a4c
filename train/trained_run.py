"""A run that was trained before, read back from its workdir."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from configs import defaults
from train import UserError, config_checks
from train.checkpoint import Checkpoints, Progress
from train.experiment import Experiment, build_experiment
from train.files import exists, read_json
from train.flags import simulate
from train.step import TrainState, abstract_state
from train.workdir import check_name, with_advice


class TrainedRun(NamedTuple):
    """What `load` returns."""

    config: ConfigDict
    experiment: Experiment  # for the devices here, whoever trained it
    state: TrainState  # of the checkpoint
    progress: Progress  # at that state


def read_config(run: pathlib.Path) -> ConfigDict:
    """Returns the config of a run; fields that it lacks take their defaults.

    Raises:
      UserError: run is no workdir, or its config.json is damaged.
    """
    path = check_name(run) / "config.json"
    if not exists(path):
        raise UserError(
            f"{run} holds no run: there is no {path}. Give the --workdir of a "
            "run."
        )
    with with_advice("Put it back from a copy."):
        then = read_json(path)
    config = defaults.get_config()
    unknown = sorted({*then} - {*config})
    if unknown:
        raise UserError(
            f"{path} has a field {unknown[0]!r} that no run of python -m train "
            "has: it is of another program, or of another version of this one."
        )
    with with_advice("Put it back from a copy."):
        try:
            config.update(then)
            config_checks.check(config, defaults)
        except UserError as error:
            raise UserError(f"{path} is damaged: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{path} is damaged: {reason}.") from error
    return config


def use_devices(run: pathlib.Path) -> None:
    """Simulates as many devices as the run had, before any is used.

    For a program of its own: it also silences what orbax says while it reads.

    Raises:
      UserError: run is no workdir.
    """
    simulate(read_config(run).cpu_devices)
    logging.set_verbosity(logging.ERROR)


def load(
    run: pathlib.Path, *, best: bool = False, data_dir: str | None = None
) -> TrainedRun:
    """Returns the newest checkpoint of a run, with its data and network.

    The folder stays as it is: the run may go on meanwhile.

    Args:
      run: its workdir.
      best: takes the checkpoint with the best test accuracy instead.
      data_dir: of TFDS. None is that of the run, where nothing is written or
        downloaded to: its config may be a stranger's.

    Raises:
      UserError: run is no workdir, or has no such checkpoint yet.
    """
    config = read_config(run)
    config.mesh = "data"
    foreign = config.data_dir is not None and data_dir is None
    config.data_dir = data_dir or config.data_dir
    experiment = build_experiment(config, download=not foreign)
    shape = experiment.dataset.train.images.shape[1:]
    like = abstract_state(experiment.recipe, shape, experiment.topology.mesh)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(like, best=best)
    if found is None:
        raise UserError(
            f"{run} has no checkpoint{' with a test' if best else ''} yet; the "
            "first is written after the first epoch."
        )
    state, progress = found
    return TrainedRun(config, experiment, state, progress)
