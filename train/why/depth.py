"""What batch norm makes of signals in deep nets before any training.

Theory gives these curves without a free parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from train.why import data, finding
from train.why.finding import Finding, Settings
from train.why.propagation import (
    collapse,
    draw_kernels,
    gradient_norms,
    growth,
    over_seeds,
    residual,
)

CLAIM = (
    "Before training, batch norm multiplies gradients by "
    "sqrt(pi / (pi - 1)) a ReLU layer, so that they explode with depth (Yang "
    "et al. 2019); makes block l of a residual net give 1/(l + 1) of the "
    "variance, which then grows by addition and not by doubling (De and Smith "
    "2020); and keeps the examples of a batch from becoming multiples of one "
    "another (Daneshmand et al. 2020)."
)
PUBLISHED = (
    "gradient norm times 1.211 a layer; shares 0.5, 0.2, 0.059, 0.030 of "
    "blocks 1, 4, 16, 32; the orthogonality gap of a linear net falls "
    "exponentially with depth to the order of 1/sqrt(width)."
)

GROWTH = float(np.sqrt(np.pi / (np.pi - 1)))  # Yang et al.
LAYERS, BLOCKS, RANK_LAYERS = 40, 32, 60
WIDTH, RANK_WIDTH, RANK_BATCH = 512, 256, 16
BATCHES = (8, 64, 256)
# Slope of the activation below zero: ReLU, and none at all.
LEAKS = {"relu": 0.0, "linear": 1.0}
BAND = (1.18, 1.24)  # of growth; a batch is not infinite, nor is a width


def run(settings: Settings) -> Finding:
    x = data.load(settings).train_x
    quick = settings.quick
    width, depth = (128, 20) if quick else (WIDTH, LAYERS)
    batches = BATCHES[1:2] if quick else BATCHES
    deep = draw_kernels(settings.seeds, x.shape[1], width, depth)
    gradients = {
        f"with {n}": over_seeds(gradient_norms, deep, x[:n], norm=True)
        for n in batches
    }
    gradients[f"without {batches[-1]}"] = over_seeds(
        gradient_norms, deep, x[: batches[-1]], norm=False
    )
    numbers = {
        "batches": batches,
        "gradients": gradients,
        "growth": {name: growth(rows) for name, rows in gradients.items()},
        "theory_growth": GROWTH,
    }
    numbers |= dict(variance={}, share={}, gap={}, rank={})
    leaks = np.array(list(LEAKS.values()), np.float32)
    blocks = draw_kernels(settings.seeds, x.shape[1], width, BLOCKS)
    long = draw_kernels(settings.seeds, x.shape[1], RANK_WIDTH, RANK_LAYERS)
    for side, norm in (("with", True), ("without", False)):
        numbers["variance"][side], numbers["share"][side] = over_seeds(
            residual, blocks, x[:256], norm=norm
        )
        both = jax.vmap(functools.partial(collapse, norm=norm), (None, None, 0))
        gap, rank = over_seeds(both, long, x[:RANK_BATCH], leaks)
        for i, name in enumerate(LEAKS):
            numbers["gap"][f"{name} {side}"] = gap[:, i]
            numbers["rank"][f"{name} {side}"] = rank[:, i]
    return Finding(
        "depth",
        "Signals in deep nets before training",
        CLAIM,
        PUBLISHED,
        _words(numbers),
        numbers,
        functools.partial(_draw, numbers),
    )


def _words(numbers: dict[str, Any]) -> str:
    batches, rate = numbers["batches"], numbers["growth"]
    wide = rate[f"with {batches[-1]}"]
    blocks = [0, 3, 15, 31]
    shares = numbers["share"]["with"][:, blocks]
    theory = 1 / (np.array(blocks) + 2)
    rank = {name: rows[:, -1] for name, rows in numbers["rank"].items()}
    holds = (
        ((wide > BAND[0]) & (wide < BAND[1]))
        & (np.abs(shares / theory - 1)[:, 1:] < 0.2).all(1)
        & (rank["relu with"] > 2 * rank["relu without"])
    )
    span = finding.span
    by_batch = ", ".join(
        f"{span(rate[f'with {n}'], '.3f')} (batch {n})" for n in batches
    )
    ends = {
        side: span(rows[:, -1], ".3g")
        for side, rows in numbers["variance"].items()
    }
    return (
        f"gradient norm times {by_batch} a layer, without batch norm "
        f"{span(rate[f'without {batches[-1]}'], '.3f')}. Shares "
        + ", ".join(f"{share:.3f}" for share in shares.mean(0))
        + f"; the variance is {ends['with']} after {BLOCKS} blocks, without "
        f"{ends['without']}. Stable rank of {RANK_BATCH} examples after "
        f"{RANK_LAYERS} ReLU layers {span(rank['relu with'], '.1f')}, without "
        f"{span(rank['relu without'], '.1f')}; the gap of the linear net ends "
        f"at {span(numbers['gap']['linear with'][:, -1], '.2f')}, without at "
        f"{span(numbers['gap']['linear without'][:, -1], '.2f')}. "
        + finding.verdict(holds)
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(9, 6.4)
    (gradient, variance), (share, rank) = figure.subplots(2, 2)
    _draw_gradients(numbers, gradient)
    blocks = np.arange(1, BLOCKS + 1)
    sides = {
        "with": (finding.WITH, finding.WITH_LABEL),
        "without": (finding.WITHOUT, finding.WITHOUT_LABEL),
    }
    for side, (color, label) in sides.items():
        kept = {"color": color, "alpha": 0.7}
        for seed, rows in enumerate(numbers["variance"][side]):
            shown = label if seed == 0 else None
            variance.semilogy(blocks, rows, label=shown, **kept)
            share.loglog(
                blocks, numbers["share"][side][seed], label=shown, **kept
            )
            for name, line in (("relu", "-"), ("linear", ":")):
                shown = f"{label}, {name}" if seed == 0 else None
                rows = numbers["rank"][f"{name} {side}"][seed]
                layers = np.arange(1, len(rows) + 1)
                rank.plot(layers, rows, line, label=shown, **kept)
    dashed = {"ls": "--", "color": finding.THEORY, "zorder": 3}
    variance.semilogy(blocks, 1.0 + blocks, label="1 + l", **dashed)
    variance.semilogy(blocks, 2.0**blocks, label="2^l", **dashed | {"ls": ":"})
    share.loglog(blocks, 1 / (1 + blocks), label="1 / (l + 1)", **dashed)
    share.set_ylim(top=1)
    variance.set(xlabel="residual block l", ylabel="variance behind the block")
    share.set(xlabel="residual block l", ylabel="the branch's share of it")
    rank.set(xlabel="layer", ylabel=f"stable rank (of {RANK_BATCH})")
    rank.set_ylim(0, RANK_BATCH)
    variance.set_title("Variance in a residual net")
    share.set_title("What a block adds to it")
    rank.set_title("How different the examples stay")
    for axes in (variance, share, rank):
        axes.legend()


def _draw_gradients(numbers: dict[str, Any], axes: Any) -> None:
    """Relative to the gradient of the last layer."""
    # The largest batch, nearest to the theory, is the full line.
    lines = dict(zip(numbers["batches"][::-1], ("-", "--", ":")))
    for name, rows in numbers["gradients"].items():
        side, n = name.split()
        color = finding.WITH if side == "with" else finding.WITHOUT
        line = lines[int(n)]
        middle = np.exp(np.log(rows / rows[:, -1:]).mean(0))
        layers = np.arange(1, len(middle) + 1)
        label = finding.WITH_LABEL if side == "with" else finding.WITHOUT_LABEL
        axes.semilogy(
            layers, middle, line, color=color, label=f"{label}, batch {n}"
        )
    theory = GROWTH ** (len(middle) - layers)
    axes.semilogy(
        layers,
        theory,
        "-.",
        color=finding.THEORY,
        lw=1.2,
        label="1.211 a layer",
    )
    axes.set(xlabel="layer", ylabel="gradient norm / that of the last layer")
    axes.set_title("Gradients on their way back")
    axes.legend()
