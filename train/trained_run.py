"""Loads a run from its workdir: data, model and the state of training."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from configs import defaults
from train import UserError, config_checks
from train.checkpoint import Checkpoints, Progress
from train.cpu_devices import simulate_cpu_devices
from train.experiment import Experiment, build_experiment
from train.files import exists, read_json
from train.state import TrainState, abstract_state
from train.workdir import check_name, with_advice


class TrainedRun(NamedTuple):
    """Result of `load_run`."""

    config: ConfigDict
    experiment: Experiment  # on the devices of this program
    state: TrainState  # restored from the checkpoint
    progress: Progress  # position of that state


def read_config(run: pathlib.Path) -> ConfigDict:
    """Returns the config of a run; missing fields take their defaults.

    Raises:
      UserError: run is not a workdir, or its config.json is damaged.
    """
    path = check_name(run) / "config.json"
    if not exists(path):
        raise UserError(
            f"{run} is not a run: there is no {path}. Use the --workdir of a "
            "run."
        )
    with with_advice("Restore it from a backup."):
        then = read_json(path)
    config = defaults.get_config()
    unknown = sorted({*then} - {*config})
    if unknown:
        raise UserError(
            f"{path} has a field {unknown[0]!r} that python -m train does not "
            "know: it is from another version."
        )
    with with_advice("Restore it from a backup."):
        try:
            config.update(then)
            config_checks.check_fields(config)
        except UserError as error:
            raise UserError(f"{path} is damaged: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{path} is damaged: {reason}.") from error
    return config


def use_devices(run: pathlib.Path) -> None:
    """Simulates as many CPU devices as the run; call before using devices.

    Also silences orbax's log messages, so only for standalone programs.

    Raises:
      UserError: run is not a workdir.
    """
    simulate_cpu_devices(read_config(run).cpu_devices)
    logging.set_verbosity(logging.ERROR)


def load_run(
    run: pathlib.Path, *, best: bool = False, data_dir: str | None = None
) -> TrainedRun:
    """Loads the newest checkpoint of a run, with its data and model.

    The workdir is not modified, so the run may continue meanwhile.

    Args:
      run: the workdir.
      best: loads the checkpoint with the best test accuracy instead.
      data_dir: TFDS data directory. None uses that of the run, read-only: its
        config may not be trusted.

    Raises:
      UserError: run is not a workdir, or has no such checkpoint yet.
    """
    config = read_config(run)
    use_one_axis(config)
    foreign = config.data_dir is not None and data_dir is None
    config.data_dir = data_dir or config.data_dir
    experiment = build_experiment(config, download=not foreign)
    shape = experiment.dataset.train.images.shape[1:]
    like = abstract_state(experiment.recipe, shape, experiment.topology)
    state, progress = restore(run, like, best=best)
    return TrainedRun(config, experiment, state, progress)


def use_one_axis(config: ConfigDict) -> None:
    """Sets the mesh to a single axis, for any number of devices.

    The axes of the run may not exist here; running statistics cover all
    examples whatever they are.
    """
    config.mesh = "data"
    if config.norm_axes != "none":
        config.norm_axes = "all"


def restore(
    run: pathlib.Path, like: TrainState, *, best: bool
) -> tuple[TrainState, Progress]:
    """Restores a checkpoint of a run, without modifying the workdir.

    Args:
      run: the workdir.
      like: shapes, dtypes and shardings; see `abstract_state`.
      best: the checkpoint with the best test accuracy, not the newest.

    Raises:
      UserError: there is no such checkpoint yet.
    """
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(like, best=best)
    if found is None:
        raise UserError(
            f"{run} has no checkpoint{' with a test' if best else ''} yet; the "
            "first is written after the first epoch."
        )
    return found
