# ruff: noqa: E402
"""Evaluates a run on every example of a split: python -m train.evaluate RUN.

Prints loss, accuracy and a per-class table; writes them, with the confusion
matrix, to RUN/evaluation.json. --best uses the checkpoint with the best test
accuracy instead of the newest; --precise N also evaluates with running
statistics recomputed over N training batches.
"""

from __future__ import annotations

from train import signals

if __name__ == "__main__":
    signals.exit_on_ctrl_c(
        "train.evaluate"
    )  # before the imports, which take seconds

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from train import UserError, cli, data
from train.augment import to_float
from train.experiment import Experiment
from train.files import as_user_error, write_json
from train.step import Recipe
from train.trained_run import TrainedRun, load, use_devices
from train.weight_average import precise_statistics

_BATCH = 1000  # examples per step


class Counts(NamedTuple):
    """Sums over examples; K classes."""

    loss: Any  # (K,) in nats, summed over the examples of a class
    confusion: Any  # (K, K) examples: rows are labels, columns predictions


def evaluate(
    run: pathlib.Path,
    saved: TrainedRun,
    *,
    split: str | None = None,
    precise: int = 0,
) -> dict[str, Any]:
    """Evaluates a run, prints the result and writes evaluation.json.

    Args:
      run: the workdir.
      saved: result of `load` for it.
      split: TFDS split expression; None is the test split of the run.
      precise: number of training batches to recompute the running statistics
        over; 0 skips this.

    Returns:
      The contents of evaluation.json: step, epoch, split, images, loss,
      accuracy, classes and confusion; under "precise" the number of batches,
      and loss to confusion with the recomputed statistics.

    Raises:
      UserError: there is no such split, the norm of the run does not support
        recomputation, or evaluation.json cannot be written.
    """
    config = saved.config
    if precise and config.norm in ("flax", "none"):
        raise UserError(
            f"--precise {precise} recomputes running statistics, which "
            f"norm={config.norm!r} does not support; leave it out."
        )
    state = saved.state
    split = split or config.test_split
    examples = _examples(saved, split)
    count = make_counter(saved.experiment, examples)
    found = {
        "step": int(state.step),
        "epoch": saved.progress.epoch,
        "split": split,
        **_result(count(state.params, state.batch_stats)),
    }
    if precise:
        read = min(precise, saved.experiment.steps)
        stats = precise_statistics(
            config,
            saved.experiment,
            state.params,
            state.batch_stats,
            batches=read,
        )
        again = _result(count(state.params, stats))
        found["precise"] = {"batches": read, **again}
    print(format_result(found, config.dataset))
    with as_user_error(run):
        write_json(run / "evaluation.json", found)
    return found


def _examples(saved: TrainedRun, split: str) -> data.Split:
    config, dataset = saved.config, saved.experiment.dataset
    if split == config.test_split:
        return dataset.test
    if split == config.train_split:
        return dataset.train
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        train_split=split,
        test_split=split,
        lazy=True,  # both splits are the same: read it once
        download=False,  # `load` has read it already
    ).test


def make_counter(
    experiment: Experiment, split: data.Split
) -> Callable[[Any, Any], Counts]:
    """Returns (params, batch_stats) -> Counts over all examples, each once."""
    topology, classes = experiment.topology, experiment.dataset.num_classes
    step = jax.jit(
        jax.shard_map(
            functools.partial(_step, experiment.recipe, topology.axes, classes),
            mesh=topology.mesh,
            in_specs=(P(), P(), P(topology.axes)),
            out_specs=P(),
        )
    )
    size = topology.padded(min(_BATCH, len(split.labels)))

    def count(params: Any, batch_stats: Any) -> Counts:
        loss, confusion = 0.0, 0
        for rows in data.test_batches(split, size, rows=topology.rows(size)):
            part = step(params, batch_stats, topology.put(rows, size))
            # To the host at once: simulated devices must not run far ahead.
            part = jax.device_get(part)
            loss = loss + np.float64(part.loss)
            confusion = confusion + np.int64(part.confusion)
        return Counts(loss, confusion)

    return count


def _step(
    recipe: Recipe,
    axes: tuple[str, ...],
    classes: int,
    params: Any,
    batch_stats: Any,
    batch: data.Batch,
) -> Counts:
    logits = recipe.model.apply(
        {"params": params, "batch_stats": batch_stats},
        to_float(batch.images, recipe.pixel_mean, recipe.pixel_std),
        train=False,
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.where(batch.where, loss, 0)
    pair = batch.labels * classes + logits.argmax(-1)
    seen = jnp.where(batch.where, 1, 0)
    local = Counts(
        jax.ops.segment_sum(loss, batch.labels, classes),
        jax.ops.segment_sum(seen, pair, classes**2),
    )
    both = jax.lax.psum(local, axes)
    return both._replace(confusion=both.confusion.reshape(classes, classes))


def _result(counts: Counts) -> dict[str, Any]:
    images = counts.confusion.sum(1)
    correct = counts.confusion.diagonal()
    total = int(images.sum())
    return {
        "images": total,
        "loss": float(counts.loss.sum() / total),
        "accuracy": float(correct.sum() / total),
        "classes": [
            {
                "images": int(n),
                "accuracy": float(c / n) if n else None,
                "loss": float(loss / n) if n else None,
            }
            for n, c, loss in zip(images, correct, counts.loss)
        ],
        "confusion": counts.confusion.tolist(),
    }


def format_result(found: dict[str, Any], dataset: str) -> str:
    """Formats the result as text."""
    again = found.get("precise")
    lines = [
        f"{dataset} {found['split']}, {found['images']:,} images, at step "
        f"{found['step']:,} (epoch {found['epoch']}):",
        f"accuracy {found['accuracy']:.2%}  loss {found['loss']:.4f}",
    ]
    if again:
        lines.append(
            f"accuracy {again['accuracy']:.2%}  loss {again['loss']:.4f}  with "
            f"statistics recomputed over {again['batches']} training batches"
        )
    head = f"{'class':>5} {'images':>7} {'accuracy':>9} {'loss':>8}"
    lines.append(head + ("   precise" if again else "") + "  mistaken for")
    for k, one in enumerate(found["classes"]):
        if not one["images"]:
            continue
        line = f"{k:>5} {one['images']:>7} {one['accuracy']:>9.2%} "
        line += f"{one['loss']:>8.4f}"
        if again:
            line += f" {again['classes'][k]['accuracy']:>9.2%}"
        lines.append(line + "  " + _mistakes(found["confusion"][k], k))
    return "\n".join(lines)


def _mistakes(row: list[int], own: int, most: int = 3) -> str:
    """Lists the classes that a class is most often mistaken for."""
    wrong = [(n, k) for k, n in enumerate(row) if n and k != own]
    wrong.sort(key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{k} ({n})" for n, k in wrong[:most])


def main(arguments: list[str]) -> None:
    parser = cli.Parser(
        "python -m train.evaluate", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("run", type=cli.folder, help="the --workdir of a run")
    parser.add_argument(
        "--split",
        help="such as test, train or train[45000:]; default: the test split",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="use the checkpoint with the best test accuracy, not the newest",
    )
    parser.add_argument(
        "--precise",
        type=int,
        default=0,
        metavar="N",
        help="also evaluate with statistics recomputed over N batches",
    )
    parser.add_argument(
        "--data_dir",
        help="TFDS data directory; default: that of the run, if prepared",
    )
    given = parser.parse_args(arguments)
    if given.precise < 0:
        parser.error(f"--precise must be at least 1; got {given.precise}")
    use_devices(given.run)
    evaluate(
        given.run,
        load(given.run, best=given.best, data_dir=given.data_dir),
        split=given.split,
        precise=given.precise,
    )
    print(f"Wrote {given.run / 'evaluation.json'}.")


if __name__ == "__main__":
    cli.run("train.evaluate", main)
