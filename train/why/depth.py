"""Signals in deep nets before training.

Claim: Before training, batch norm multiplies gradients by sqrt(pi / (pi - 1)) a
ReLU layer, so that they explode with depth (Yang et al. 2019); makes block l of
a residual net give 1/(l + 1) of the variance, which then grows by addition and
not by doubling (De and Smith 2020); and keeps the examples of a batch from
becoming multiples of one another (Daneshmand et al. 2020).

Published: gradient norm times 1.211 a layer; shares 0.5, 0.2, 0.059, 0.030 of
blocks 1, 4, 16, 32; the orthogonality gap of a linear net falls exponentially
with depth to the order of 1/sqrt(width).

Theory gives these curves without a free parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import batch_norm
from train.why import plots
from train.why.arms import ARMS
from train.why.data import Data, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.nets import Norm
from train.why.words import say

GROWTH = float(np.sqrt(np.pi / (np.pi - 1)))  # Yang et al.
BAND = (1.18, 1.24)  # of growth; a batch is not infinite, nor is a width
ENDS = 5  # layers at either end that growth leaves out
LAYERS, BLOCKS, RANK_LAYERS = 40, 32, 60
WIDTH, RANK_WIDTH, RANK_BATCH = 512, 256, 16
BATCHES = (8, 64, 256)
# Slope of the activation below zero: ReLU, and none at all.
LEAKS = {"relu": 0.0, "linear": 1.0}


def draw_kernels(
    seeds: tuple[int, ...], inputs: int, width: int, layers: int
) -> list[np.ndarray]:
    """Standard normal (S, inputs, width) and (S, layers, width, width)."""
    drawn = [np.random.default_rng(seed) for seed in seeds]
    return [
        np.stack([rng.standard_normal(shape, np.float32) for rng in drawn])
        for shape in ((inputs, width), (layers, width, width))
    ]


def _start(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
    return x @ kernels[0] / len(kernels[0]) ** 0.5


def _through(h: jax.Array, kernel: jax.Array, gain: Any = 2.0) -> jax.Array:
    """h W with W of variance gain / width; 2 is that of He et al."""
    return h @ kernel * (gain / len(kernel)) ** 0.5


def _normed(h: jax.Array, norm: Norm) -> jax.Array:
    return norm(h)[0] if norm else h


@per_seed
def gradient_norms(kernels: Any, x: jax.Array, *, norm: Norm) -> jax.Array:
    """Norm of the gradient at the input of each layer: (layers,).

    A layer is relu(batch norm(h W)), W after He et al. The gradient at the
    output is random.
    """
    start = _start(kernels, x)

    def layer(h, given):
        tap, kernel = given
        h = _through(h + tap, kernel)
        return jax.nn.relu(_normed(h, norm)), None

    def output(taps):
        return jax.lax.scan(layer, start, (taps, kernels[1]))[0]

    taps = jnp.zeros((len(kernels[1]), *start.shape))
    _, backward = jax.vjp(output, taps)
    (slopes,) = backward(jax.random.normal(jax.random.key(0), start.shape))
    return jnp.sqrt(jnp.square(slopes).sum((1, 2)))


def growth(norms: np.ndarray) -> np.ndarray:
    """Factor by which gradients (S, layers) grow on their way back: (S,).

    Least squares through the logarithms, without the layers at the ends.
    """
    inside = np.log(norms[:, ENDS:-ENDS])
    return np.exp(-np.polyfit(np.arange(inside.shape[1]), inside.T, 1)[0])


@per_seed
def residual(kernels: Any, x: jax.Array, *, norm: Norm) -> Any:
    """x + relu(batch norm(x)) W, block after block, W after He et al.

    The first input has variance 1. Returns the variance behind each block and
    the branch's variance over it, means over features: (layers,).
    """

    def block(h, kernel):
        branch = _through(jax.nn.relu(_normed(h, norm)), kernel)
        new = h + branch
        whole = new.var(0).mean()
        return new, (whole, branch.var(0).mean() / whole)

    start, _ = batch_norm(_start(kernels, x))
    return jax.lax.scan(block, start, kernels[1])[1]


@per_seed
def collapse(
    kernels: Any, x: jax.Array, leaks: jax.Array, *, norm: Norm
) -> tuple[jax.Array, jax.Array]:
    """How far the examples of a batch are from orthogonal, by layer.

    A layer is batch norm(leaky_relu(h) W). With G = h h^T of the n examples
    the gap is || G / tr(G) - I / n ||_F and the stable rank tr(G) / ||G||_2:
    n when they are orthogonal, 1 when all are multiples of one. Returns both,
    (leaks, layers).
    """

    def one(leak):
        def layer(h, kernel):
            h = _through(jax.nn.leaky_relu(h, leak), kernel, 2 / (1 + leak**2))
            h = _normed(h, norm)
            g = h @ h.T
            g = g / jnp.trace(g)
            gap = jnp.linalg.norm(g - jnp.eye(len(h)) / len(h))
            return h, (gap, 1 / jnp.linalg.eigvalsh(g)[-1])

        return jax.lax.scan(layer, _start(kernels, x), kernels[1])[1]

    return jax.vmap(one)(leaks)


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    x, quick = data.train[0], settings.quick
    width, layers = (128, 20) if quick else (WIDTH, LAYERS)
    batches = BATCHES[1:2] if quick else BATCHES
    kernels = functools.partial(draw_kernels, settings.seeds, x.shape[1])
    deep = kernels(width, layers)
    runs = [("with", n) for n in batches] + [("without", batches[-1])]
    gradients = {
        f"{name} {n}": jax.device_get(
            gradient_norms(deep, x[:n], **ARMS[name].options)
        )
        for name, n in runs
    }
    residuals = each(ARMS, residual, kernels(width, BLOCKS), x[:256])
    given = kernels(RANK_WIDTH, RANK_LAYERS), x[:RANK_BATCH]
    found = each(ARMS, collapse, *given, np.float32([*LEAKS.values()]))
    collapses = {
        f"{leak} {name}": [rows[:, i] for rows in both]
        for name, both in found.items()
        for i, leak in enumerate(LEAKS)
    }
    variance, share, gap, rank = (
        {name: both[i] for name, both in found.items()}
        for found in (residuals, collapses)
        for i in (0, 1)
    )
    return {
        "batches": batches,
        "gradients": gradients,
        "growth": {name: growth(rows) for name, rows in gradients.items()},
        "theory_growth": GROWTH,
        **{"variance": variance, "share": share, "gap": gap, "rank": rank},
    }


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
    holds = (
        ((wide > BAND[0]) & (wide < BAND[1]))
        & (np.abs(shares / theory - 1)[:, 1:] < 0.2).all(1)
        & (last["rank"]["relu with"] > 2 * last["rank"]["relu without"])
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


PANELS = (
    "Gradients on their way back | layer | "
    "gradient norm / that of the last layer",
    "Variance in a residual net | residual block l | variance behind the block",
    "What a block adds to it | residual block l | the branch's share of it",
    f"How different the examples stay | layer | stable rank (of {RANK_BATCH})",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), size=(9, 6.4)
)
