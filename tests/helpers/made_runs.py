"""The files of a run, and its report, without running it."""

import json

from configs import digits
from train.report import Report
from train.workdir import open_workdir


def make_run(workdir, accuracies, *, finished=True, **changes):
    config = digits.get_config()
    config.update(epochs=3, **changes)
    open_workdir(workdir, config.lock())
    lines = []
    for epoch, accuracy in enumerate(accuracies, 1):
        record = {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 2 - accuracy,
            "train_accuracy": accuracy,
            "test_loss": 1 - accuracy,
            "test_accuracy": accuracy,
            "learning_rate": 0.1,
            "images_per_second": 100.0,
            "skipped": 0,
        }
        lines.append(json.dumps(record) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
    if finished:
        summary = {
            "test_accuracy": accuracies[-1],
            "devices": 4,
            "device_kind": "cpu",
            "seconds": 20.0 + config.seed,
        }
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def open_report(path, *, epochs=5, done=0, **options):
    """The report of a run of ten images in each epoch, all of them tested."""
    given = {"images": 10 * epochs, "images_done": 10 * done, **options}
    return Report(path, tested=range(1, epochs + 1), done=done, **given)
