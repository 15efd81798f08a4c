"""Which learning rates and initial scales train a net at all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from train.why import data, finding, nets
from train.why.finding import Finding, Settings

CLAIM = (
    "Batch norm trains at learning rates and initial scales at which a plain "
    "net does not (Ioffe and Szegedy 2015, 3.3; Santurkar et al. 2018, "
    "figure 1; Bjorck et al. 2018). What counts is lr / |w|^2: kernels s "
    "times as large want s^2 times the rate (van Laarhoven 2017)."
)
PUBLISHED = (
    "ResNet-110 on CIFAR-10 reaches about 93% at lr 0.1 with batch norm; "
    "without, about 82% at lr 0.0001, nearly the largest that trains; there "
    "batch norm gives nothing (81%). Read off figures of Bjorck et al."
)

HIDDEN, BATCH = (64,) * 6, 64
SCALES = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
RATES = 10 ** np.arange(-3, 1.01, 0.5)
# Shares of the best test accuracy of any cell: one that has learned, and the
# one that the wanted rate of a scale is read off at.
GOOD, WANTED = 0.91, 0.95


def run(settings: Settings) -> Finding:
    found = data.load(settings)
    quick = settings.quick
    scales = SCALES[1:4] if quick else SCALES
    rates = RATES[::2] if quick else RATES
    steps = 100 if quick else 200
    accuracy, finite = {}, {}
    for name, norm in (("with", True), ("without", False)):
        accuracy[name], finite[name] = sweep(
            found,
            scales,
            rates,
            norm=norm,
            steps=steps,
            seeds=settings.seeds,
        )
    best = max(cells.max() for cells in accuracy.values())
    wanted = wanted_rates(accuracy["with"], rates, WANTED * best)
    numbers = {
        "scales": scales,
        "rates": rates,
        "hidden": HIDDEN,
        "steps": steps,
        "accuracy": accuracy,
        "finite": finite,
        "best": best,
        "good": {
            name: (cells > GOOD * best).sum((1, 2))
            for name, cells in accuracy.items()
        },
        "wanted_rates": wanted,
        "exponent": exponent(scales, wanted, 0.3, 1.0),
    }
    return Finding(
        "tolerance",
        "Learning rates and initial scales that train",
        CLAIM,
        PUBLISHED,
        _words(numbers),
        numbers,
        functools.partial(_draw, numbers),
    )


def sweep(
    found: data.Data,
    scales: np.ndarray,
    rates: np.ndarray,
    *,
    norm: bool,
    steps: int,
    seeds: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Trains a net in every cell, from the same draw and examples.

    Args:
      found: data.
      scales: (J,) factors on hidden kernels drawn after He et al.
      rates: (I,) of plain SGD.
      norm: with batch norm.
      steps: of training.
      seeds: S of them.

    Returns:
      (test accuracy with the statistics of all training data, whether the
      last loss was finite), both (S, J, I). What is not finite guesses: it is
      right for one class.
    """
    sizes = (found.train_x.shape[1], *HIDDEN, found.num_classes)

    def one(key, places, train, test, scale, rate):
        params = nets.init(key, sizes, norm=norm, factor=scale)
        loss = nets.loss_of(norm=norm)
        params, losses, _ = nets.sgd(loss, params, train, places, rate)
        known = nets.population(params, train[0], norm=norm)
        right = nets.accuracy(params, *test, norm=norm, statistics=known)
        chance = 1 / found.num_classes
        finite = jnp.isfinite(losses[-1])
        return jnp.where(finite, right, chance), finite

    cells = jax.vmap(one, (None, None, None, None, None, 0))
    cells = jax.jit(jax.vmap(cells, (None, None, None, None, 0, None)))
    rows = []
    for seed in seeds:
        places = data.places(
            len(found.train_y), batch_size=BATCH, steps=steps, seed=seed
        )
        rows.append(
            cells(
                jax.random.key(seed),
                places,
                (found.train_x, found.train_y),
                (found.test_x, found.test_y),
                scales.astype(np.float32),
                rates.astype(np.float32),
            )
        )
    return tuple(np.stack(part) for part in zip(*rows))


def wanted_rates(
    accuracy: np.ndarray, rates: np.ndarray, level: float
) -> np.ndarray:
    """The smallest rate that reaches a level, between cells by a line.

    Args:
      accuracy: (S, J, I).
      rates: (I,), rising; the line is in their logarithm.
      level: of accuracy.

    Returns:
      (S, J). NaN where no rate reaches it, or the smallest already does.
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


def _words(numbers: dict[str, Any]) -> str:
    cells = numbers["scales"].size * numbers["rates"].size
    good, power = numbers["good"], numbers["exponent"]
    told = (
        f"{finding.span(good['with'], 'g')} of {cells} cells learn with batch "
        f"norm and {finding.span(good['without'], 'g')} without (they come to "
        f"{GOOD:.0%} of the best test accuracy of all, {numbers['best']:.1%}). "
    ) + finding.verdict(good["with"] > good["without"])
    if np.isfinite(power).all():
        told += (
            " From s = 0.3 to 1 the smallest rate that comes to "
            f"{WANTED:.0%} of the best grows as s to the power "
            f"{finding.span(power, '.2f')}; the law says 2."
        )
    return told


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(10.5, 3.5)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.85))
    for axes, name, title in (
        (left, "with", finding.WITH_LABEL),
        (middle, "without", finding.WITHOUT_LABEL),
    ):
        _draw_cells(numbers, name, axes)
        color = finding.WITH if name == "with" else finding.WITHOUT
        axes.set_title(f"{title}: test accuracy (%)", color=color)
    scales = numbers["scales"]
    unit = int(np.argmin(np.abs(scales - 1)))
    for name, color, label in (
        ("with", finding.WITH, finding.WITH_LABEL),
        ("without", finding.WITHOUT, finding.WITHOUT_LABEL),
    ):
        for seed, rows in enumerate(numbers["accuracy"][name]):
            right.semilogx(
                numbers["rates"],
                100 * rows[unit],
                ".-",
                color=color,
                alpha=0.7,
                label=label if seed == 0 else None,
            )
    right.set(xlabel="learning rate", ylabel="test accuracy (%)", ylim=(0, 103))
    right.set_title("At s = 1, a line a seed")
    right.legend(loc="lower left")


def _draw_cells(numbers: dict[str, Any], name: str, axes: Any) -> None:
    """A heat map, mean over seeds, and the rates that the law expects."""
    scales, rates = numbers["scales"], numbers["rates"]
    cells = 100 * numbers["accuracy"][name].mean(0)
    finite = numbers["finite"][name].any(0)
    axes.imshow(
        cells, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto"
    )
    for j, i in np.ndindex(cells.shape):
        axes.text(
            i,
            j,
            f"{cells[j, i]:.0f}" if finite[j, i] else "NaN",
            ha="center",
            va="center",
            fontsize=7.5,
            color="black" if cells[j, i] > 55 else "white",
        )
    ticks = np.flatnonzero(np.isclose(np.log10(rates) % 1, 0))
    names = [f"$10^{{{round(np.log10(rates[i]))}}}$" for i in ticks]
    axes.set_xticks(ticks, names)
    axes.set_yticks(range(len(scales)), [f"{s:g}" for s in scales])
    axes.set(xlabel="learning rate", ylabel="scale s of the kernels")
    if name == "without":
        return
    unit = int(np.argmin(np.abs(scales - 1)))
    wanted = np.median(numbers["wanted_rates"][:, unit])
    if not np.isfinite(wanted):
        return
    law = wanted * scales**2
    place = np.interp(np.log(law), np.log(rates), np.arange(len(rates)))
    inside = (law >= rates[0]) & (law <= rates[-1])
    axes.plot(
        place[inside],
        np.flatnonzero(inside),
        "--",
        color="black",
        lw=1.2,
    )
    axes.set_xlabel("learning rate (dashed: as s²)")
