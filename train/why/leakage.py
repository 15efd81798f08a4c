"""Label leakage through the statistics of a device.

Claim: If every device normalizes its own examples, a network can learn from
their statistics what single examples do not reveal. It then ignores the
examples, and fails if they are normalized with others.

Published: Mask R-CNN with batch norm in its heads and one image per GPU, box
AP: 30.7 per GPU, 41.7 shuffled, 41.7 synchronized, 41.1 without batch norm (Wu
and Johnson 2021, Rethinking Batch in BatchNorm, Table 6). MoCo shuffles for the
same reason (He et al. 2020).

The task is whether a label is even. An extra channel is (2 even - 1) + offset,
with one offset for all examples of a device, as crops of one image have the
same lighting. Half of the examples of each device are even.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from matplotlib.colors import PowerNorm

from train.why import devices, plots
from train.why.data import Data, Setting, Settings, keys
from train.why.devices import EACH, EVAL_BATCHES, EVERY, SHOWN
from train.why.experiment import Experiment
from train.why.methods import FOURTH, THIRD, WITH, WITHOUT, Method
from train.why.words import held, largest, percent

METHODS = {
    "none": WITHOUT,
    "per device": Method("per device", FOURTH),
    "shuffled": Method("shuffled", THIRD),
    "synchronized": Method("synchronized", WITH.color),
}


def prepare(data: Data, seeds: tuple[int, ...], steps: int) -> Setting:
    """Draws what `devices.train` takes."""
    parts = [(data.train, steps), *((part, EVAL_BATCHES) for part in data[:2])]
    drawn = [
        tuple(
            devices.draw(*part, seed=(seed, i)) for i, part in enumerate(parts)
        )
        for seed in seeds
    ]
    drawn = jax.tree.map(lambda *a: np.stack(a), *drawn)
    return Setting(keys(seeds), drawn, data.train, data.test)


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains with statistics per device, shuffled, synchronized, or none."""
    steps = 100 if settings.quick else 400
    if settings.data != "digits":
        steps *= 5
    setting = prepare(data, settings.seeds, steps)
    numbers: dict[str, Any] = {}
    for name in METHODS:
        curves = devices.train(setting, method=name)
        given = name, curves, setting
        numbers[name] = _numbers(curves, devices.influence(*given))
        if name == "per device":
            alone = devices.influence(*given, train=False)
            others = alone[~np.eye(len(alone), dtype=bool)]
            numbers["influence_in_inference"] = float(others.max())
    test = {name: numbers[name]["test"] for name in METHODS}
    gap = {name: numbers[name]["train"] - test[name] for name in METHODS}
    numbers["holds"] = np.all(
        [
            (gap["per device"] > gap[name]) & (test["per device"] < test[name])
            for name in METHODS
            if name != "per device"
        ],
        axis=0,
    )
    return numbers


def _numbers(found: devices.Curves, matrix: np.ndarray) -> dict[str, Any]:
    device = np.arange(SHOWN * EACH) // EACH
    far = device[:, None] != device
    numbers = {
        "train_accuracy": found.train,
        "test_accuracy": found.test,
        "train": found.train[:, -EVERY:].mean(1),
        "test": found.test[:, -1],
        "test_per_device": found.per_device,
        "test_shuffled": found.shuffled,
        "influence": matrix,
        "influence_other_device": matrix[far].mean(),
    }
    return {name: np.asarray(value) for name, value in numbers.items()}


def verdict(numbers: dict[str, Any]) -> list[str]:
    per_device, synchronized = numbers["per device"], numbers["synchronized"]
    accuracy = "; ".join(
        f"{method.label}, {percent(numbers[name]['train'])} and "
        f"{percent(numbers[name]['test'])}"
        for name, method in METHODS.items()
    )
    return [
        "Accuracy on training batches, and on test images with population "
        f"statistics (chance: 50%): {accuracy}.",
        held(
            "The largest difference, and the lowest test accuracy, with "
            "statistics per device",
            numbers["holds"],
        ),
        "On test images, the network trained with statistics per device has "
        f"an accuracy of {percent(per_device['test_per_device'])} if a device "
        "has examples with the same offset, and of "
        f"{percent(per_device['test_shuffled'])} if they are shuffled.",
        "Mean derivative of logits with respect to an example of another "
        f"device: {largest(per_device['influence_other_device'])} per device, "
        f"{largest(synchronized['influence_other_device'])} synchronized; in "
        "inference, with respect to any other example, at most "
        f"{largest(numbers['influence_in_inference'])}.",
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    above, below = np.split(axes, 2)
    most = max(numbers[name]["influence"].max() for name in METHODS)
    for i, (name, (_, color, *_)) in enumerate(METHODS.items()):
        found = numbers[name]
        image = _draw_influence(above[i], found["influence"], most)
        steps, train = plots.by_steps(100 * found["train_accuracy"], EVERY)
        test = 100 * found["test_accuracy"]
        gap = {"color": color, "alpha": 0.1}
        plots.shade(below[i], steps, train.mean(0), test.mean(0), **gap)
        plots.band(below[i], steps, train, Method(None, color, "--"))
        plots.band(below[i], steps, test, Method(None, color))
        plots.level(below[i], 50)
        below[i].set_ylim(40, 103)
        for place in (above[i], below[i]):
            place.tick_params(labelleft=i == 0)
    plots.note(below[1], 0.3, 0.82, "training", FOURTH)
    plots.note(below[1], 0.3, 0.35, "test", FOURTH)
    plots.note(below[0], 0.45, 0.04, "chance")
    place = {"ax": list(above), "fraction": 0.02, "pad": 0.01}
    bar = above[0].figure.colorbar(image, **place)
    bar.set_label("|∂logits / ∂input|\n(white: exactly 0)")


def _draw_influence(axes: Any, matrix: np.ndarray, most: float) -> Any:
    # Zero has its own color, so that exact independence is visible.
    shown = np.ma.masked_equal(matrix, 0)
    image = axes.imshow(shown, norm=PowerNorm(0.5, 0, most), cmap="YlGnBu")
    for edge in range(EACH, len(matrix), EACH):
        for line in (axes.axhline, axes.axvline):
            line(edge - 0.5, color="#999999", linewidth=0.6)
    middle = np.arange(SHOWN) * EACH + (EACH - 1) / 2
    names = [str(i + 1) for i in range(SHOWN)]
    axes.set_xticks(middle, names)
    axes.set_yticks(middle, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    return image


PANELS = (
    *(
        f"{method.label.capitalize()} | input on device | {ylabel}"
        for method, ylabel in zip(
            METHODS.values(), ("logits on device", "", "", "")
        )
    ),
    " | step | accuracy (%)",
    *[" | step | "] * 3,
)
EXPERIMENT = Experiment(
    measure,
    verdict,
    draw,
    PANELS,
    shape=(2, 4),
    height=4.2,
    grid={"height_ratios": (1.2, 1)},
)
