"""Signals and gradients in deep nets before training.

Theory gives these curves without a free parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from train.why import plots
from train.why.arms import ARMS
from train.why.data import Data, Settings
from train.why.experiment import Experiment, say
from train.why.propagation import (
    collapse,
    draw_kernels,
    gradient_norms,
    growth,
    over_seeds,
    residual,
)

GROWTH = float(np.sqrt(np.pi / (np.pi - 1)))  # Yang et al.
LAYERS, BLOCKS, RANK_LAYERS = 40, 32, 60
WIDTH, RANK_WIDTH, RANK_BATCH = 512, 256, 16
BATCHES = (8, 64, 256)
# Slope of the activation below zero: ReLU, and none at all.
LEAKS = {"relu": 0.0, "linear": 1.0}
BAND = (1.18, 1.24)  # of growth; a batch is not infinite, nor is a width


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    x, seeds, quick = data.train_x, settings.seeds, settings.quick
    width, layers = (128, 20) if quick else (WIDTH, LAYERS)
    batches = BATCHES[1:2] if quick else BATCHES
    deep = draw_kernels(seeds, x.shape[1], width, layers)
    runs = {f"with {n}": (n, True) for n in batches}
    runs[f"without {batches[-1]}"] = batches[-1], False
    gradients = {
        name: over_seeds(gradient_norms, deep, x[:n], norm=norm)
        for name, (n, norm) in runs.items()
    }
    numbers = {
        "batches": batches,
        "gradients": gradients,
        "growth": {name: growth(rows) for name, rows in gradients.items()},
        "theory_growth": GROWTH,
    }
    numbers |= dict(variance={}, share={}, gap={}, rank={})
    leaks = np.array(list(LEAKS.values()), np.float32)
    blocks = draw_kernels(seeds, x.shape[1], width, BLOCKS)
    long = draw_kernels(seeds, x.shape[1], RANK_WIDTH, RANK_LAYERS)
    for name, arm in ARMS.items():
        numbers["variance"][name], numbers["share"][name] = over_seeds(
            residual, blocks, x[:256], **arm.options
        )
        both = functools.partial(collapse, **arm.options)
        both = jax.vmap(both, (None, None, 0))
        gap, rank = over_seeds(both, long, x[:RANK_BATCH], leaks)
        for i, leak in enumerate(LEAKS):
            numbers["gap"][f"{leak} {name}"] = gap[:, i]
            numbers["rank"][f"{leak} {name}"] = rank[:, i]
    return numbers


def verdict(numbers: dict[str, Any]) -> str:
    batches, rate = numbers["batches"], numbers["growth"]
    wide = rate[f"with {batches[-1]}"]
    blocks = [0, 3, 15, 31]
    shares = numbers["share"]["with"][:, blocks]
    theory = 1 / (np.array(blocks) + 2)
    last = {
        key: {name: rows[:, -1] for name, rows in numbers[key].items()}
        for key in ("variance", "rank", "gap")
    }
    rank = last["rank"]
    holds = (
        ((wide > BAND[0]) & (wide < BAND[1]))
        & (np.abs(shares / theory - 1)[:, 1:] < 0.2).all(1)
        & (rank["relu with"] > 2 * rank["relu without"])
    )
    by_batch = ", ".join(f"{{rate[with {n}]:.3f}} (batch {n})" for n in batches)
    return say(
        f"gradient norm times {by_batch} a layer, without batch norm "
        f"{{rate[without {batches[-1]}]:.3f}}. Shares "
        + ", ".join(f"{share:.3f}" for share in shares.mean(0))
        + f"; the variance is {{variance[with]}} after {BLOCKS} blocks, "
        "without {variance[without]}. Stable rank of "
        f"{RANK_BATCH} examples after {RANK_LAYERS} ReLU layers "
        "{rank[relu with]:.1f}, without {rank[relu without]:.1f}; the gap of "
        "the linear net ends at {gap[linear with]:.2f}, without at "
        "{gap[linear without]:.2f}. {holds:verdict}",
        rate=rate,
        holds=holds,
        **last,
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    gradient, variance, share, rank = axes
    # The largest batch, nearest to the theory, is the full line.
    styles = dict(zip(numbers["batches"][::-1], ("-", "--", ":")))
    for run, rows in numbers["gradients"].items():
        name, n = run.split()
        label = f"{ARMS[name].label}, batch {n}"
        line = ARMS[name]._replace(label=label, style=styles[int(n)])
        mean = np.exp(np.log(rows / rows[:, -1:]).mean(0))
        layers = np.arange(1, len(mean) + 1)
        plots.lines(gradient, layers, mean[None], line, alpha=1)
    expected = GROWTH ** (len(mean) - layers)
    plots.theory(gradient, layers, expected, "1.211 a layer", "-.")
    blocks = np.arange(1, BLOCKS + 1)
    for name, arm in ARMS.items():
        plots.lines(variance, blocks, numbers["variance"][name], arm)
        plots.lines(share, blocks, numbers["share"][name], arm)
        for leak, style in (("relu", "-"), ("linear", ":")):
            rows = numbers["rank"][f"{leak} {name}"]
            line = arm._replace(label=f"{arm.label}, {leak}", style=style)
            plots.lines(rank, np.arange(1, rows.shape[1] + 1), rows, line)
    plots.theory(variance, blocks, 1.0 + blocks, "1 + l")
    plots.theory(variance, blocks, 2.0**blocks, "2^l", ":")
    plots.theory(share, blocks, 1 / (1 + blocks), "1 / (l + 1)")
    gradient.semilogy()
    variance.semilogy()
    share.loglog()
    share.set_ylim(top=1)
    rank.set_ylim(0, RANK_BATCH)


EXPERIMENT = Experiment(
    "depth",
    "Signals in deep nets before training",
    claim=(
        "Before training, batch norm multiplies gradients by sqrt(pi / (pi - "
        "1)) a ReLU layer, so that they explode with depth (Yang et al. 2019); "
        "makes block l of a residual net give 1/(l + 1) of the variance, which "
        "then grows by addition and not by doubling (De and Smith 2020); and "
        "keeps the examples of a batch from becoming multiples of one another "
        "(Daneshmand et al. 2020)."
    ),
    published=(
        "gradient norm times 1.211 a layer; shares 0.5, 0.2, 0.059, 0.030 of "
        "blocks 1, 4, 16, 32; the orthogonality gap of a linear net falls "
        "exponentially with depth to the order of 1/sqrt(width)."
    ),
    measure=measure,
    verdict=verdict,
    draw=draw,
    panels=(
        "Gradients on their way back | layer | "
        "gradient norm / that of the last layer",
        "Variance in a residual net | residual block l | "
        "variance behind the block",
        "What a block adds to it | residual block l | the branch's share of it",
        "How different the examples stay | layer | "
        f"stable rank (of {RANK_BATCH})",
    ),
    shape=(2, 2),
    size=(9, 6.4),
)
