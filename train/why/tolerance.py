"""Learning rates and initial scales that train.

Claim: Batch norm trains at learning rates and initial scales at which a plain
net does not (Ioffe and Szegedy 2015, 3.3; Santurkar et al. 2018, figure 1;
Bjorck et al. 2018). What counts is lr / |w|^2: kernels s times as large want
s^2 times the rate (van Laarhoven 2017).

Published: ResNet-110 on CIFAR-10 reaches about 93% at lr 0.1 with batch norm;
without, about 82% at lr 0.0001, nearly the largest that trains; there batch
norm gives nothing (81%). Read off figures of Bjorck et al.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.why import nets, plots
from train.why.arms import ARMS
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each
from train.why.nets import Norm, Sizes
from train.why.words import say

HIDDEN = (64,) * 6
SCALES = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
RATES = 10 ** np.arange(-3, 1.01, 0.5)
# Shares of the best test accuracy of any cell: one that has learned, and the
# one that the wanted rate of a scale is read off at.
GOOD, WANTED = 0.91, 0.95


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    quick = settings.quick
    scales = SCALES[1:4] if quick else SCALES
    rates = RATES[::2] if quick else RATES
    steps = 100 if quick else 200
    setting = data.setting(settings.seeds, steps=steps, batch_size=64)
    found = each(ARMS, sweep, setting, data.sizes(*HIDDEN), scales, rates)
    accuracy = {name: cells[0] for name, cells in found.items()}
    best = max(cells.max() for cells in accuracy.values())
    wanted = wanted_rates(accuracy["with"], rates, WANTED * best)
    return {
        "scales": scales,
        "rates": rates,
        "hidden": HIDDEN,
        "steps": steps,
        "accuracy": accuracy,
        "finite": {name: cells[1] for name, cells in found.items()},
        "best": best,
        "good": {
            name: (cells > GOOD * best).sum((1, 2))
            for name, cells in accuracy.items()
        },
        "wanted_rates": wanted,
        "exponent": exponent(scales, wanted, 0.3, 1.0),
    }


def sweep(
    setting: Setting, sizes: Sizes, scales: Any, rates: Any, *, norm: Norm
) -> list[np.ndarray]:
    """Trains a net in every cell, from the same draw and examples.

    Hidden kernels are drawn after He et al., times a scale.

    Returns:
      test accuracy with the statistics of all training data, and whether the
      last loss was finite: (seeds, scales, rates). What is not finite guesses:
      it is right for one class.
    """

    def cell(key, indices, train, test, scale, rate):
        params = nets.init(key, sizes, norm=norm, factor=scale)
        loss, sgd = nets.loss_on(train, norm=norm), optax.sgd(rate)
        params, losses, _ = nets.train(loss, params, indices, sgd)
        known = nets.apply(params, train[0], norm=norm).moments
        logits = nets.apply(params, test[0], norm=norm, statistics=known).logits
        finite = jnp.isfinite(losses[-1])
        right = nets.accuracy(logits, test[1])
        return jnp.where(finite, right, 1 / sizes[-1]), finite

    cells = jax.vmap(cell, (*[None] * 5, 0))
    cells = jax.jit(jax.vmap(cells, (*[None] * 4, 0, None)))
    grid = scales.astype(np.float32), rates.astype(np.float32)
    # Seed by seed, for memory.
    shared = setting.train, setting.test, *grid
    rows = [cells(*seed, *shared) for seed in zip(*setting[:2])]
    return [np.stack(part) for part in zip(*rows)]


def wanted_rates(
    accuracy: np.ndarray, rates: np.ndarray, level: float
) -> np.ndarray:
    """The smallest of the rising rates that reaches a level: (S, J).

    Between cells of accuracy (S, J, I) by a line in the logarithm of the rate.
    NaN where no rate reaches it, or the smallest already does.
    """
    found = np.full(accuracy.shape[:2], np.nan)
    logs = np.log(rates)
    for cell in np.ndindex(found.shape):
        row = accuracy[cell]
        i = int(np.argmax(row >= level))
        if i and row[i] >= level:
            share = (level - row[i - 1]) / (row[i] - row[i - 1])
            found[cell] = np.exp(logs[i - 1] + share * (logs[i] - logs[i - 1]))
    return found


def exponent(
    scales: np.ndarray, wanted: np.ndarray, low: float, high: float
) -> np.ndarray:
    """p in (wanted rate) ~ scale^p between two scales: (S,)."""
    i, j = (int(np.argmin(np.abs(scales - s))) for s in (low, high))
    return np.log(wanted[:, j] / wanted[:, i]) / np.log(scales[j] / scales[i])


def verdict(numbers: dict[str, Any]) -> str:
    good, power = numbers["good"], numbers["exponent"]
    text = (
        "{good[with]:g} of {cells:g} cells learn with batch norm and "
        "{good[without]:g} without (they come to "
        f"{GOOD:.0%} of the best test accuracy of all, {{best:.1%}}). "
        "{holds:verdict}"
    )
    if np.isfinite(power).all():
        text += (
            " From s = 0.3 to 1 the smallest rate that comes to "
            f"{WANTED:.0%} of the best grows as s to the power {{power:.2f}}; "
            "the law says 2."
        )
    return say(
        text,
        good=good,
        cells=numbers["scales"].size * numbers["rates"].size,
        best=numbers["best"],
        holds=good["with"] > good["without"],
        power=power,
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    scales, rates = numbers["scales"], numbers["rates"]
    unit = int(np.argmin(np.abs(scales - 1)))
    for name, place in zip(("with", "without"), axes):
        arm = ARMS[name]
        _draw_cells(numbers, name, place)
        place.title.set_color(arm.color)
        values = 100 * numbers["accuracy"][name][:, unit]
        plots.lines(axes[2], rates, values, arm._replace(style=".-"))
    axes[2].semilogx()
    axes[2].set_ylim(0, 103)
    # The rates that the law expects.
    wanted = np.median(numbers["wanted_rates"][:, unit])
    if not np.isfinite(wanted):
        return
    law = wanted * scales**2
    inside = np.flatnonzero((law >= rates[0]) & (law <= rates[-1]))
    columns = np.interp(np.log(law), np.log(rates), np.arange(len(rates)))
    axes[0].plot(columns[inside], inside, "--", color="black", lw=1.2)


def _draw_cells(numbers: dict[str, Any], name: str, axes: Any) -> None:
    """A heat map, mean over seeds."""
    scales, rates = numbers["scales"], numbers["rates"]
    cells = 100 * numbers["accuracy"][name].mean(0)
    finite = numbers["finite"][name].any(0)
    options = {"cmap": "cividis", "vmin": 0, "vmax": 100}
    axes.imshow(cells, origin="lower", aspect="auto", **options)
    for j, i in np.ndindex(cells.shape):
        text = f"{cells[j, i]:.0f}" if finite[j, i] else "NaN"
        color = "black" if cells[j, i] > 55 else "white"
        options = {"ha": "center", "va": "center", "fontsize": 7.5}
        axes.text(i, j, text, color=color, **options)
    ticks = np.flatnonzero(np.isclose(np.log10(rates) % 1, 0))
    names = [f"$10^{{{round(np.log10(rates[i]))}}}$" for i in ticks]
    axes.set_xticks(ticks, names)
    axes.set_yticks(range(len(scales)), [f"{s:g}" for s in scales])


PANELS = (
    "with batch norm: test accuracy (%) | learning rate (dashed: as s²) | "
    "scale s of the kernels",
    "without: test accuracy (%) | learning rate | scale s of the kernels",
    "At s = 1, a line a seed | learning rate | test accuracy (%)",
)
EXPERIMENT = Experiment(
    measure,
    verdict,
    draw,
    PANELS,
    shape=(1, 3),
    size=(10.5, 3.5),
    grid={"width_ratios": (1, 1, 0.85)},
)
