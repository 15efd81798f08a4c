"""Test accuracy (%) by learning rate and weight scale.

Claim: Batch norm trains with learning rates and initial scales with which the
same network without it does not (Ioffe and Szegedy 2015, section 3.3; Santurkar
et al. 2018, figure 1; Bjorck et al. 2018). Only lr / |w|^2 matters: weights s
times as large need a learning rate s^2 times as large (van Laarhoven 2017).

Published: With batch norm, ResNet-110 on CIFAR-10 reaches about 93% at lr 0.1.
Without, it reaches about 82% at lr 0.0001, close to the largest with which it
trains; with batch norm, lr 0.0001 gives 81% (read off the figures of Bjorck et
al.).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.why import nets, plots
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each
from train.why.methods import METHODS
from train.why.nets import Norm, Sizes
from train.why.words import held, span

HIDDEN = (64,) * 6
SCALES = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
RATES = 10 ** np.arange(-3, 1.01, 0.5)
# Fractions of the best test accuracy of all cells: a cell above the first has
# learned, and the smallest rate that reaches the second is compared with s^2.
GOOD, WANTED = 0.91, 0.95


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    quick = settings.quick
    scales = SCALES[1:4] if quick else SCALES
    rates = RATES[::2] if quick else RATES
    steps = 100 if quick else 200
    setting = data.setting(settings.seeds, steps=steps, batch_size=64)
    found = each(METHODS, sweep, setting, data.sizes(*HIDDEN), scales, rates)
    accuracy = {name: cells[0] for name, cells in found.items()}
    best = max(cells.max() for cells in accuracy.values())
    wanted = wanted_rates(accuracy["with"], rates, WANTED * best)
    return {
        "scales": scales,
        "rates": rates,
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
    """Trains a network in every cell, on the same examples.

    Hidden kernels are the same draw (He et al.) times a scale.

    Returns:
      test accuracy with the statistics of all training data, and whether the
      last loss was finite: (seeds, scales, rates). Where it is not, the
      accuracy is that of chance.
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
    """The smallest rate whose accuracy reaches a level, for each scale: (S, J).

    Interpolates accuracy (S, J, I) linearly in the logarithm of the rate. NaN
    where no rate reaches the level, or the first one already does.
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


def verdict(numbers: dict[str, Any]) -> list[str]:
    good, power = numbers["good"], numbers["exponent"]
    cells = numbers["scales"].size * numbers["rates"].size
    sentences = [
        f"{span(good['with'], 'g')} of {cells} combinations of learning rate "
        f"and scale learn with batch norm, {span(good['without'], 'g')} without "
        f"(that is, reach {GOOD:.0%} of the best test accuracy, "
        f"{numbers['best']:.1%}).",
        held("More with batch norm", good["with"] > good["without"]),
    ]
    if np.isfinite(power).all():
        sentences.append(
            f"The smallest learning rate that reaches {WANTED:.0%} of the best "
            "test accuracy grows from s = 0.3 to 1 as s to the power of "
            f"{span(power, '.2f')}; the theory is 2."
        )
    return sentences


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    scales, rates = numbers["scales"], numbers["rates"]
    for name, place in zip(("with", "without"), axes):
        _draw_cells(numbers, name, place)
    # The rates that theory predicts from that for s = 1.
    unit = int(np.argmin(np.abs(scales - 1)))
    wanted = np.median(numbers["wanted_rates"][:, unit])
    if not np.isfinite(wanted):
        return
    law = wanted * scales**2
    inside = np.flatnonzero((law >= rates[0]) & (law <= rates[-1]))
    columns = np.interp(np.log(law), np.log(rates), np.arange(len(rates)))
    law = columns[inside], inside, "rate ∝ s²"
    plots.theory(axes[0], *law, color="black", alpha=0.6)
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
    axes[0].legend(**above, borderpad=0.2, borderaxespad=0, handlelength=1.6)


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
        options = {"ha": "center", "va": "center", "fontsize": 8, "zorder": 4}
        axes.text(i, j, text, color=color, **options)
    ticks = np.flatnonzero(np.isclose(np.log10(rates) % 1, 0))
    axes.set_xticks(ticks, [f"{rates[i]:g}" for i in ticks])
    axes.set_yticks(range(len(scales)), [f"{s:g}" for s in scales])


_AXES = "learning rate | scale s of the initial weights"
PANELS = (f"Batch norm | {_AXES}", f"No batch norm | {_AXES}")
EXPERIMENT = Experiment(measure, verdict, draw, PANELS, shape=(1, 2), height=3)
