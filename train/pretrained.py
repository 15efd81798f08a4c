# ruff: noqa: E402
"""Lists the trained networks of the repository: python -m train.pretrained.

With RUN NAME, adds the network of a finished run under a name. Weights are
stored in float16, and computed with in float32.
"""

from __future__ import annotations

from train import clock, signals

if __name__ == "__main__":
    # Before the imports, which take seconds.
    signals.exit_on_ctrl_c("train.pretrained")
    clock.start("importing")

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from train import UserError, cli
from train.files import (
    as_user_error,
    atomic_write,
    exists,
    read_json,
    write_json,
)
from train.load import TrainedNetwork, inference_experiment, load
from train.preprocessing import FILE as PREPROCESSING
from train.preprocessing import read_preprocessing
from train.trained_run import read_config
from train.workdir import read_summary

FOLDER = pathlib.Path(__file__).resolve().parent / "weights"
WEIGHTS = "weights.safetensors"


def names() -> list[str]:
    """Returns the names of all networks."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def load_network(name: str) -> TrainedNetwork:
    """Returns a network that comes with the repository.

    Args:
      name: one of `names`.

    Returns:
      The network, with variables in float32.

    Raises:
      UserError: there is no such network.

    Example:
      trained = load_network("digits_resnet8")
      # uint8 images, (N, 8, 8, 1) in 0..255, as of data.load_dataset
      classes = trained.logits(images).argmax(-1)
    """
    if name not in names():
        raise UserError(
            f"There is no network {name!r}; there are {', '.join(names())}."
        )
    folder = FOLDER / name
    config, preprocess = read_config(folder), read_preprocessing(folder)
    recipe = inference_experiment(config, preprocess).recipe
    flat = {
        path: jnp.asarray(leaf, jnp.float32)
        for path, leaf in load_file(folder / WEIGHTS).items()
    }
    return TrainedNetwork(
        model=recipe.model,
        variables=unflatten_dict(flat, sep="/"),
        preprocess=preprocess,
        config=config,
        step=int(results(name)["steps"]),
    )


def results(name: str) -> dict[str, Any]:
    """Returns the contents of summary.json of the run."""
    return read_summary(FOLDER / name)


def save(run: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes config, preprocessing, results and weights of a finished run.

    Raises:
      UserError: the run is not finished, or the folder cannot be written.
    """
    trained, summary = load(run), read_summary(run)
    if not summary:
        raise UserError(f"{run} has no summary.json: it is not finished.")
    flat = flatten_dict(jax.device_get(trained.variables), sep="/")
    weights = {path: leaf.astype(np.float16) for path, leaf in flat.items()}
    with as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The data directory is of the machine.
        config = {**read_json(run / "config.json"), "data_dir": None}
        write_json(folder / "config.json", config)
        write_json(folder / PREPROCESSING, read_json(run / PREPROCESSING))
        write_json(folder / "summary.json", summary)
        with atomic_write(folder / WEIGHTS) as file:
            file.write(to_bytes(weights))


def main(arguments: list[str]) -> None:
    parser = cli.Parser(
        "python -m train.pretrained", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "run", type=cli.folder, nargs="?", help="the --workdir of a run"
    )
    parser.add_argument("name", nargs="?", help="such as digits_resnet8")
    given = parser.parse_args(arguments)
    if given.run is None:
        for name in names():
            accuracy = results(name)["test_accuracy"]
            print(f"{name}  test accuracy {accuracy:.2%}")
        return
    if not re.fullmatch(r"\w+", given.name or ""):
        parser.error(f"NAME must consist of letters and _; got {given.name!r}")
    logging.set_verbosity(logging.ERROR)  # of orbax
    folder = FOLDER / given.name
    if exists(folder / WEIGHTS):
        raise UserError(f"{folder} exists; remove it, or use another name.")
    save(given.run, folder)
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    cli.run("train.pretrained", main)
