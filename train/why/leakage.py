"""What a net reads from the statistics of its companions, and where."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from train.why import data, devices, draw, finding
from train.why.devices import DEVICES, EACH, EVERY, LOOK, SHOWN, WAYS, Curves
from train.why.finding import Finding, Settings

CLAIM = (
    "Where every device normalizes its own examples, a net reads from their "
    "common statistics what single examples do not show; it stops looking at "
    "the example, and fails where the companions are others."
)

COLORS = {
    "none": finding.WITHOUT,
    "per device": finding.FOURTH,
    "shuffled": finding.THIRD,
    "synchronized": finding.WITH,
}


def run(settings: Settings) -> Finding:
    """Trains with statistics per device, shuffled, synchronized, or none.

    The task is whether a label is even. An extra channel holds
    (2 even - 1) + offset, with one offset of standard deviation 10 for all
    examples of a device, as all crops of an image share its light. Half of
    the examples of each device are even.
    """
    found = data.load(settings)
    steps = 100 if settings.quick else 400
    if settings.data != "digits":
        steps *= 5
    train = (found.train_x, found.train_y)
    test = (found.test_x, found.test_y)
    looks = steps // EVERY
    drawn = [
        (
            devices.draw(train, steps, seed=(seed, 0)),
            devices.draw(train, LOOK, seed=(seed, 1)),
            devices.draw(test, LOOK, seed=(seed, 2)),
        )
        for seed in settings.seeds
    ]
    drawn = jax.tree.map(lambda *a: np.stack(a), *drawn)
    keys = jax.vmap(jax.random.key)(np.asarray(settings.seeds))
    curves, matrices = {}, {}
    for way in WAYS:
        curves[way] = devices.train(
            keys, train, test, drawn, way=way, looks=looks
        )
        matrices[way] = devices.influence(way, curves[way], test, drawn[2])
    numbers = _numbers(curves, matrices)
    alone = devices.influence(
        "per device", curves["per device"], test, drawn[2], train=False
    )
    numbers["influence_in_inference"] = _others(alone)
    return Finding(
        name="leakage",
        title="Who shares statistics, and what leaks through them",
        claim=CLAIM,
        published=(
            "Mask R-CNN with batch norm in its heads, one image on a GPU, box "
            "AP: per GPU 30.7, shuffled 41.7, synchronized 41.7, without "
            "41.1 (Wu and Johnson 2021, Rethinking Batch in BatchNorm, Table "
            "6). He et al. (2020), MoCo, shuffle for the same reason."
        ),
        measured=_words(numbers),
        numbers=numbers,
        draw=functools.partial(_draw, numbers),
    )


def _numbers(
    curves: dict[str, Curves], matrices: dict[str, np.ndarray]
) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "chance": 0.5,
        "devices": DEVICES,
        "examples_per_device": EACH,
    }
    device = np.arange(SHOWN * EACH) // EACH
    far = device[:, None] != device
    near = ~far & ~np.eye(len(far), dtype=bool)
    for way in WAYS:
        found = curves[way]
        matrix = matrices[way]
        numbers[way] = {
            "train_accuracy": np.asarray(found.train),
            "test_accuracy": np.asarray(found.test),
            "train": np.asarray(found.train[:, -EVERY:].mean(1)),
            "test": np.asarray(found.test[:, -1]),
            "same_companions": np.asarray(found.same),
            "mixed_companions": np.asarray(found.mixed),
            "influence": matrix,
            "influence_self": np.diag(matrix).mean(),
            "influence_same_device": matrix[near].mean(),
            "influence_other_device": matrix[far].mean(),
        }
    test = {way: numbers[way]["test"] for way in WAYS}
    gap = {way: numbers[way]["train"] - test[way] for way in WAYS}
    others = [way for way in WAYS if way != "per device"]
    numbers["holds"] = np.all(
        [
            (gap["per device"] > gap[way]) & (test["per device"] < test[way])
            for way in others
        ],
        axis=0,
    )
    return numbers


def _others(matrix: np.ndarray) -> float:
    """The largest influence of one example on another."""
    return float(matrix[~np.eye(len(matrix), dtype=bool)].max())


def _words(numbers: dict[str, Any]) -> str:
    span = functools.partial(finding.span, spec=".2f")
    accuracy = "; ".join(
        f"{way} {span(numbers[way]['train'])}, {span(numbers[way]['test'])}"
        for way in WAYS
    )
    alone, together = numbers["per device"], numbers["synchronized"]
    return (
        f"accuracy on training batches, on test images with population "
        f"statistics (chance 0.5): {accuracy}. The per-device net on test "
        f"images among companions of its device "
        f"{span(alone['same_companions'])}, among companions from all devices "
        f"{span(alone['mixed_companions'])}. An example moves logits on other "
        f"devices by {finding.number(alone['influence_other_device'])} per "
        f"device, {finding.number(together['influence_other_device'])} "
        "synchronized; in inference any by "
        f"{finding.number(numbers['influence_in_inference'])}. The gap is the widest, and the test the worst, per "
        f"device: {draw.tally(numbers['holds'])}."
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(10.5, 5.6)
    axes = figure.subplots(2, len(WAYS), height_ratios=(1.2, 1))
    most = max(numbers[way]["influence"].max() for way in WAYS)
    for i, way in enumerate(WAYS):
        found = numbers[way]
        image = _draw_influence(axes[0, i], way, found["influence"], most)
        _draw_accuracy(axes[1, i], COLORS[way], found, named=i == 0)
    axes[0, 0].set_ylabel("logits of an example on")
    axes[1, 0].set_ylabel("accuracy (%)")
    bar = figure.colorbar(image, ax=list(axes[0]), fraction=0.02, pad=0.01)
    bar.set_label("|d logits / d x|; white is exactly 0")


def _draw_influence(
    axis: Any, way: str, matrix: np.ndarray, most: float
) -> Any:
    # Zero has a colour of its own, so that exact independence shows.
    shown = np.ma.masked_equal(matrix, 0)
    image = axis.imshow(shown, norm=PowerNorm(0.5, 0, most), cmap="YlGnBu")
    for edge in range(EACH, len(matrix), EACH):
        for line in (axis.axhline, axis.axvline):
            line(edge - 0.5, color="#999999", linewidth=0.6)
    middle = np.arange(SHOWN) * EACH + (EACH - 1) / 2
    names = [f"{i + 1}" for i in range(SHOWN)]
    axis.set_xticks(middle, names)
    axis.set_yticks(middle, [f"device {name}" for name in names])
    axis.tick_params(length=0, labelleft=way == WAYS[0])
    axis.spines[:].set_visible(True)
    axis.set_title(
        "no batch norm" if way == "none" else way,
        color=COLORS[way],
        fontweight="bold",
    )
    axis.set_xlabel("by an example on device")
    return image


def _draw_accuracy(
    axis: Any, color: str, found: dict[str, Any], *, named: bool
) -> None:
    steps, train = draw.by_steps(100 * found["train_accuracy"], EVERY)
    test = 100 * found["test_accuracy"]
    axis.fill_between(
        steps,
        train.mean(0),
        test.mean(0),
        color=color,
        alpha=0.1,
        lw=0,
        label="gap",
    )
    for values, style, label in (
        (train, "--", "training batches"),
        (test, "-", "test images"),
    ):
        draw.band(axis, steps, values, color=color, style=style, label=label)
    axis.axhline(50, color=finding.THEORY, linewidth=0.8, linestyle=":")
    axis.text(steps[-1], 49, "chance", ha="right", va="top", fontsize=8)
    axis.set(ylim=(40, 103), xlabel="step")
    if named:
        axis.legend(loc="lower left", bbox_to_anchor=(0.1, 0.16))
