"""Who shares statistics, and what leaks through them.

Claim: Where every device normalizes its own examples, a net reads from their
common statistics what single examples do not show; it stops looking at the
example, and fails where the companions are others.

Published: Mask R-CNN with batch norm in its heads, one image on a GPU, box AP:
per GPU 30.7, shuffled 41.7, synchronized 41.7, without 41.1 (Wu and Johnson
2021, Rethinking Batch in BatchNorm, Table 6). He et al. (2020), MoCo, shuffle
for the same reason.

The task is whether a label is even. An extra channel holds (2 even - 1) +
offset, with one offset for all examples of a device, as all crops of an image
share its light. Half of the examples of each device are even.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from matplotlib.colors import PowerNorm

from train.why import devices, plots
from train.why.arms import FOURTH, THIRD, WITH, WITHOUT, Arm
from train.why.data import Data, Setting, Settings, keys
from train.why.devices import DEVICES, EACH, EVAL_BATCHES, EVERY, SHOWN
from train.why.experiment import Experiment
from train.why.words import say

COLORS = {
    "none": WITHOUT.color,
    "per device": FOURTH,
    "shuffled": THIRD,
    "synchronized": WITH.color,
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
    numbers: dict[str, Any] = {
        "chance": 0.5,
        "devices": DEVICES,
        "examples_per_device": EACH,
    }
    for arm in COLORS:
        curves = devices.train(setting, arm=arm)
        given = arm, curves, setting
        numbers[arm] = _numbers(curves, devices.influence(*given))
        if arm == "per device":
            alone = devices.influence(*given, train=False)
            others = alone[~np.eye(len(alone), dtype=bool)]
            numbers["influence_in_inference"] = float(others.max())
    test = {arm: numbers[arm]["test"] for arm in COLORS}
    gap = {arm: numbers[arm]["train"] - test[arm] for arm in COLORS}
    numbers["holds"] = np.all(
        [
            (gap["per device"] > gap[arm]) & (test["per device"] < test[arm])
            for arm in COLORS
            if arm != "per device"
        ],
        axis=0,
    )
    return numbers


def _numbers(found: devices.Curves, matrix: np.ndarray) -> dict[str, Any]:
    device = np.arange(SHOWN * EACH) // EACH
    far = device[:, None] != device
    near = ~far & ~np.eye(len(far), dtype=bool)
    numbers = {
        "train_accuracy": found.train,
        "test_accuracy": found.test,
        "train": found.train[:, -EVERY:].mean(1),
        "test": found.test[:, -1],
        "same_companions": found.same,
        "mixed_companions": found.mixed,
        "influence": matrix,
        "influence_self": np.diag(matrix).mean(),
        "influence_same_device": matrix[near].mean(),
        "influence_other_device": matrix[far].mean(),
    }
    return {name: np.asarray(value) for name, value in numbers.items()}


def verdict(numbers: dict[str, Any]) -> str:
    accuracy = "; ".join(
        f"{arm} {{n[{arm}][train]:.2f}}, {{n[{arm}][test]:.2f}}"
        for arm in COLORS
    )
    return say(
        "accuracy on training batches, on test images with population "
        f"statistics (chance 0.5): {accuracy}. The per-device net on test "
        "images among companions of its device {a[same_companions]:.2f}, among "
        "companions from all devices {a[mixed_companions]:.2f}. An example "
        "moves logits on other devices by {a[influence_other_device]:max} per "
        "device, {b[influence_other_device]:max} synchronized; in inference "
        "any by {n[influence_in_inference]:max}. The gap is the widest, and "
        "the test the worst, per device: {n[holds]:tally}.",
        n=numbers,
        a=numbers["per device"],
        b=numbers["synchronized"],
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    above, below = np.split(axes, 2)
    most = max(numbers[arm]["influence"].max() for arm in COLORS)
    for i, (arm, color) in enumerate(COLORS.items()):
        image = _draw_influence(above[i], numbers[arm]["influence"], most)
        above[i].tick_params(length=0, labelleft=i == 0)
        above[i].title.set_color(color)
        steps, train = plots.by_steps(
            100 * numbers[arm]["train_accuracy"], EVERY
        )
        test = 100 * numbers[arm]["test_accuracy"]
        gap = {"color": color, "alpha": 0.1, "label": "gap"}
        plots.shade(below[i], steps, train.mean(0), test.mean(0), **gap)
        plots.band(below[i], steps, train, Arm("training batches", color, "--"))
        plots.band(below[i], steps, test, Arm("test images", color))
        plots.level(below[i], 50)
        below[i].text(steps[-1], 49, "chance", ha="right", va="top", fontsize=8)
        below[i].set_ylim(40, 103)
        legend = below[i].legend(loc="lower left", bbox_to_anchor=(0.1, 0.16))
        legend.set_visible(i == 0)
    place = {"ax": list(above), "fraction": 0.02, "pad": 0.01}
    bar = above[0].figure.colorbar(image, **place)
    bar.set_label("|d logits / d x|; white is exactly 0")


def _draw_influence(axes: Any, matrix: np.ndarray, most: float) -> Any:
    # Zero has a colour of its own, so that exact independence shows.
    shown = np.ma.masked_equal(matrix, 0)
    image = axes.imshow(shown, norm=PowerNorm(0.5, 0, most), cmap="YlGnBu")
    for edge in range(EACH, len(matrix), EACH):
        for line in (axes.axhline, axes.axvline):
            line(edge - 0.5, color="#999999", linewidth=0.6)
    middle = np.arange(SHOWN) * EACH + (EACH - 1) / 2
    names = [f"{i + 1}" for i in range(SHOWN)]
    axes.set_xticks(middle, names)
    axes.set_yticks(middle, [f"device {name}" for name in names])
    axes.spines[:].set_visible(True)
    return image


_BY = "by an example on device"
PANELS = (
    f"no batch norm | {_BY} | logits of an example on",
    *(f"{arm} | {_BY} | " for arm in list(COLORS)[1:]),
    " | step | accuracy (%)",
    *[" | step | "] * 3,
)
EXPERIMENT = Experiment(
    measure,
    verdict,
    draw,
    PANELS,
    shape=(2, 4),
    size=(10.5, 5.6),
    grid={"height_ratios": (1.2, 1)},
)
