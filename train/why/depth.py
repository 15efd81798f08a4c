"""Signals at initialization.

Claim: At initialization, batch norm multiplies gradients by sqrt(pi / (pi - 1))
per ReLU layer, so that they explode with depth (Yang et al. 2019). In a
residual network, block l contributes 1 / (l + 1) of the variance, which grows
linearly instead of doubling (De and Smith 2020). And the examples of a batch do
not become parallel (Daneshmand et al. 2020).

Published: The gradient norm grows 1.211 times per layer. Blocks 1, 4, 16 and 32
contribute 0.5, 0.2, 0.059 and 0.030. The orthogonality gap of a linear network
decreases exponentially with depth to the order of 1 / sqrt(width).

The curves of the theory have no free parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import batch_norm
from train.why import plots
from train.why.data import Data, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.methods import METHODS
from train.why.nets import Norm
from train.why.words import held, span

GROWTH = float(np.sqrt(np.pi / (np.pi - 1)))  # Yang et al.
BAND = (1.18, 1.24)  # of growth, since batch and width are finite
ENDS = 5  # layers at either end that are excluded from growth
LAYERS, BLOCKS, RANK_LAYERS = 40, 32, 60
WIDTH, RANK_WIDTH, RANK_BATCH = 512, 256, 16
BATCHES = (8, 64, 256)
# Slope of the activation below zero.
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
    """h W with W of variance gain / width; a gain of 2 is that of He et al."""
    return h @ kernel * (gain / len(kernel)) ** 0.5


def _normed(h: jax.Array, norm: Norm) -> jax.Array:
    return norm(h)[0] if norm else h


@per_seed
def gradient_norms(kernels: Any, x: jax.Array, *, norm: Norm) -> jax.Array:
    """Norm of the gradient at the input of each layer: (layers,).

    A layer is relu(batch norm(h W)), with the W of He et al. The gradient at
    the output is random.
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
    """Factor by which gradients (S, layers) grow per layer, backwards: (S,).

    Least squares on the logarithms, without the layers at the ends.
    """
    inside = np.log(norms[:, ENDS:-ENDS])
    return np.exp(-np.polyfit(np.arange(inside.shape[1]), inside.T, 1)[0])


@per_seed
def residual(kernels: Any, x: jax.Array, *, norm: Norm) -> Any:
    """Blocks x + relu(batch norm(x)) W, with the W of He et al.

    The first input has variance 1. Returns the variance after each block and
    the fraction of it from the branch, means over features: (layers,).
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
    """How far the examples of a batch are from orthogonal, after each layer.

    A layer is batch norm(leaky_relu(h) W). With G = h h^T of n examples, the
    gap is || G / tr(G) - I / n ||_F, and the stable rank is tr(G) / ||G||_2: n
    if they are orthogonal, 1 if they are parallel. Returns both, (leaks,
    layers).
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
            gradient_norms(deep, x[:n], **METHODS[name].options)
        )
        for name, n in runs
    }
    residuals = each(METHODS, residual, kernels(width, BLOCKS), x[:256])
    given = kernels(RANK_WIDTH, RANK_LAYERS), x[:RANK_BATCH]
    found = each(METHODS, collapse, *given, np.float32([*LEAKS.values()]))
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
    by_batch = ", ".join(
        f"{span(rate[f'with {n}'], '.3f')} (batch size {n})" for n in batches
    )
    variance, rank, gap = last["variance"], last["rank"], last["gap"]
    return [
        f"The gradient norm grows per layer {by_batch} times with batch norm, "
        f"{span(rate[f'without {batches[-1]}'], '.3f')} times without.",
        "Blocks 1, 4, 16 and 32 contribute "
        f"{', '.join(f'{share:.3f}' for share in shares.mean(0))} of the "
        f"variance, which after {BLOCKS} blocks is {span(variance['with'])} "
        f"with batch norm, {span(variance['without'])} without.",
        f"The stable rank of {RANK_BATCH} examples after {RANK_LAYERS} ReLU "
        f"layers is {span(rank['relu with'], '.1f')} with batch norm, "
        f"{span(rank['relu without'], '.1f')} without. The orthogonality gap "
        f"of the linear network ends at {span(gap['linear with'], '.2f')} "
        f"with it, {span(gap['linear without'], '.2f')} without.",
        held("As published", holds),
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    gradient, variance, share, rank = axes
    # The largest batch, closest to the theory, is the solid line.
    styles = dict(zip(numbers["batches"][::-1], ("-", "--", ":")))
    for run, rows in numbers["gradients"].items():
        name, n = run.split()
        label = f"{METHODS[name].label}, batch size {n}"
        line = METHODS[name]._replace(label=label, style=styles[int(n)])
        mean = np.exp(np.log(rows / rows[:, -1:]).mean(0))
        layers = np.arange(1, len(mean) + 1)
        plots.lines(gradient, layers, mean[None], line, alpha=1)
    expected = GROWTH ** (len(mean) - layers)
    plots.theory(gradient, layers, expected, "1.211 per layer", "-.")
    blocks = np.arange(1, BLOCKS + 1)
    for name, method in METHODS.items():
        plots.lines(variance, blocks, numbers["variance"][name], method)
        plots.lines(share, blocks, numbers["share"][name], method)
        for leak, style in (("relu", "-"), ("linear", ":")):
            rows = numbers["rank"][f"{leak} {name}"]
            label = f"{method.label}, {leak}"
            line = method._replace(label=label, style=style)
            plots.lines(rank, np.arange(1, rows.shape[1] + 1), rows, line)
    plots.theory(variance, blocks, 1.0 + blocks, "1 + l")
    plots.theory(variance, blocks, 2.0**blocks, "$2^l$", ":")
    plots.theory(share, blocks, 1 / (1 + blocks), "1 / (l + 1)")
    gradient.semilogy()
    gradient.set_ylim(top=50 * gradient.get_ylim()[1])  # for the legend
    variance.semilogy()
    share.loglog()
    share.set_ylim(top=1)
    rank.set_ylim(0, RANK_BATCH)
    for place in axes:
        place.legend()


PANELS = (
    "Gradient norm, relative to the last layer | layer | relative norm",
    "Variance in a residual network | residual block l | variance",
    "Contribution of a block | residual block l | fraction of the variance",
    f"Stable rank of {RANK_BATCH} examples | layer | stable rank",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), height=5.4
)
