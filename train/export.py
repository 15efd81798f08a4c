# ruff: noqa: E402
"""Exports a run for inference: python -m train.export RUN [--out FOLDER].

RUN is the workdir of a run or, with --out, the name of a network of
train.pretrained. Folds batch norm into the convolutions and writes, into
RUN/exported without --out:

- program.bin: a `jax.export` program, (weights, uint8 images) -> logits, for
  any number of images, on CPUs, GPUs and TPUs. It needs JAX alone, no model
  code.
- weights.safetensors: its weights.
- about.json: the shape of an image, the classes, the step, the difference from
  the network that was trained.

--best takes the checkpoint with the best test accuracy in place of the newest.
"""

from __future__ import annotations

from train import clock, signals

if __name__ == "__main__":
    # Before the imports, which take seconds.
    signals.exit_on_ctrl_c("train.export")
    clock.start("importing")

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from jaxbn.fold import Folded, fold
from train import UserError, cli, output, pretrained
from train.files import (
    as_user_error,
    atomic_write,
    exists,
    refuse_links,
    write_json,
)
from train.load import TrainedNetwork, load
from train.trained_run import use_devices

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(trained: TrainedNetwork, out: pathlib.Path) -> dict[str, Any]:
    """Writes the files into a folder; returns the contents of about.json.

    Args:
      trained: of `train.load.load`.
      out: output directory, created if missing.

    Raises:
      UserError: the folder cannot be written to.
    """
    folded = folded_network(trained)
    weights = {name: np.asarray(leaf) for name, leaf in folded.params.items()}
    (images,) = jax.export.symbolic_shape("images")

    def logits(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        pixels = trained.preprocess(images)
        result: jax.Array = folded.apply(weights, pixels)
        return result

    program = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(
        {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in weights.items()},
        jax.ShapeDtypeStruct(
            (images, *trained.preprocess.image_shape), jnp.uint8
        ),
    )
    about = {
        "image_shape": list(trained.preprocess.image_shape),
        "num_classes": trained.preprocess.num_classes,
        "step": trained.step,
        "largest_difference": float(folded.max_difference.relative),
        "jax": jax.__version__,
    }
    with as_user_error(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("program.bin", program.serialize()),
            ("weights.safetensors", save(weights)),
        ):
            with atomic_write(out / name) as file:
                file.write(content)
        write_json(out / "about.json", about)
    return about


def folded_network(trained: TrainedNetwork) -> Folded:
    """Returns the network of inference without its batch normalization."""
    shape = (2, *trained.preprocess.image_shape)
    return fold(
        lambda variables, x: trained.model.apply(variables, x, train=False),
        trained.variables,
        jnp.zeros(shape, jnp.float32),
        on_unfoldable="keep",
    )


def main(arguments: list[str]) -> None:
    parser = cli.Parser(
        "python -m train.export", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "run",
        type=cli.folder,
        help="the --workdir of a run, or a name of train.pretrained",
    )
    parser.add_argument(
        "--out", help="folder to write to; default RUN/exported"
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="use the checkpoint with the best test accuracy, not the newest",
    )
    given = parser.parse_args(arguments)
    if given.out is not None and not given.out:
        raise UserError("--out is empty; give a folder.")
    shipped = str(given.run) in pretrained.names() and not exists(given.run)
    if shipped and given.out is None:
        raise UserError(f"{given.run} is of train.pretrained: set --out.")
    out = pathlib.Path(given.out or given.run / "exported").expanduser()
    if given.out is None:
        refuse_links(out)  # the workdir may not be trusted
    if shipped:
        trained = pretrained.load_network(str(given.run))
    else:
        use_devices(given.run)
        trained = load(given.run, best=given.best)
    about = export(trained, out)
    line = (
        f"Step {about['step']} is in {out}; folding changed logits by at most "
        f"{about['largest_difference']:.1e} of the largest."
    )
    print(output.wrap(line))


if __name__ == "__main__":
    cli.run("train.export", main)
