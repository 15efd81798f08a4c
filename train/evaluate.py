# ruff: noqa: E402
"""Evaluates a run on every example of a split: python -m train.evaluate RUN.

Prints loss, accuracy and a per-class table; writes them, with the confusion
matrix, to RUN/evaluation.json. --best uses the checkpoint with the best test
accuracy instead of the newest; --precise N also evaluates with running
statistics recomputed over N training batches.
"""

from __future__ import annotations

from train import clock, signals

if __name__ == "__main__":
    # Before the imports, which take seconds.
    signals.exit_on_ctrl_c("train.evaluate")
    clock.start("importing")

import pathlib
from typing import Any

from train import UserError, cli, data, output
from train.confusion import make_counter, metrics
from train.files import as_user_error, write_json
from train.trained_run import TrainedRun, load_run, use_devices
from train.weight_average import precise_statistics


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
      saved: result of `load_run` for it.
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
    with clock.show("evaluating"):
        found = {
            "step": int(state.step),
            "epoch": saved.progress.epoch,
            "split": split,
            **metrics(count(state.variables)),
        }
    if precise:
        read = min(precise, saved.experiment.steps.per_epoch)
        with clock.show(f"recomputing statistics over {read} batches"):
            stats = precise_statistics(
                config,
                saved.experiment,
                state.variables,
                batches=read,
            )
            again = metrics(count({**state.variables, "batch_stats": stats}))
        found["precise"] = {"batches": read, **again}
    print(output.wrap(format_result(found, config.dataset)))
    with as_user_error(run):
        write_json(run / "evaluation.json", found)
    return found


def _examples(saved: TrainedRun, split: str) -> data.Split:
    config, dataset = saved.config, saved.experiment.dataset
    if split == config.test_split:
        return dataset.test
    if split == config.train_split:
        return dataset.train
    return data.load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        train_split=split,
        test_split=split,
        lazy=True,  # both splits are the same: read it once
        download=False,  # `load_run` has read it already
    ).test


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
    with clock.show(f"loading {given.run}"):
        saved = load_run(given.run, best=given.best, data_dir=given.data_dir)
    evaluate(given.run, saved, split=given.split, precise=given.precise)
    print(f"Wrote {given.run / 'evaluation.json'}.")


if __name__ == "__main__":
    cli.run("train.evaluate", main)
