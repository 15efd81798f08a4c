"""What batch norm makes of signals in deep nets before any training.

Theory gives these curves without a free parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxbn import batch_norm
from train.why import data, finding
from train.why.finding import Finding, Settings

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
# Layers at either end that are left out where growth a layer is read off.
ENDS = 5
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


class Kernels(NamedTuple):
    """Of a deep net, standard normal; each use scales them."""

    first: Any  # (inputs, width)
    rest: Any  # (layers, width, width)


def draw_kernels(
    seeds: tuple[int, ...], inputs: int, width: int, layers: int
) -> Kernels:
    """Draws for all seeds; each field has a leading axis of seeds."""

    def one(seed):
        rng = np.random.default_rng(seed)
        shapes = (inputs, width), (layers, width, width)
        return [rng.standard_normal(shape, np.float32) for shape in shapes]

    return Kernels(*map(np.stack, zip(*map(one, seeds))))


def over_seeds(
    measure: Callable, kernels: Kernels, *arrays: np.ndarray, **options: Any
) -> Any:
    """measure(kernels of a seed, *arrays), stacked over seeds."""
    every = functools.partial(measure, **options)
    every = jax.vmap(every, (0, *(None,) * len(arrays)))
    return jax.tree.map(np.asarray, jax.jit(every)(kernels, *arrays))


def _start(kernels: Kernels, x: jax.Array) -> jax.Array:
    return x @ kernels.first / len(kernels.first) ** 0.5


def _through(
    h: jax.Array, kernel: jax.Array, gain: float | jax.Array = 2.0
) -> jax.Array:
    """h W with W of variance gain / width; 2 is that of He et al."""
    return h @ kernel * (gain / len(kernel)) ** 0.5


def _normed(h: jax.Array, norm: bool) -> jax.Array:
    return batch_norm(h)[0] if norm else h


def gradient_norms(kernels: Kernels, x: jax.Array, *, norm: bool) -> jax.Array:
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
        return jax.lax.scan(layer, start, (taps, kernels.rest))[0]

    taps = jnp.zeros((len(kernels.rest), *start.shape))
    _, backward = jax.vjp(output, taps)
    (slopes,) = backward(jax.random.normal(jax.random.key(0), start.shape))
    return jnp.sqrt(jnp.square(slopes).sum((1, 2)))


def growth(norms: np.ndarray) -> np.ndarray:
    """Factor by which gradients grow a layer on their way back.

    Least squares through the logarithms, without the layers at the ends.

    Args:
      norms: (S, layers).

    Returns:
      (S,).
    """
    inside = np.log(norms[:, ENDS : norms.shape[1] - ENDS])
    slope = np.polyfit(np.arange(inside.shape[1]), inside.T, 1)[0]
    return np.exp(-slope)


def residual(
    kernels: Kernels, x: jax.Array, *, norm: bool
) -> tuple[jax.Array, jax.Array]:
    """x + relu(batch norm(x)) W, block after block, W after He et al.

    Returns:
      (variance behind each block, the branch's variance over it), both
      (layers,), means over features. The first input has variance 1.
    """

    def block(h, kernel):
        branch = _through(jax.nn.relu(_normed(h, norm)), kernel)
        new = h + branch
        whole = new.var(0).mean()
        return new, (whole, branch.var(0).mean() / whole)

    start = _normed(_start(kernels, x), True)
    return jax.lax.scan(block, start, kernels.rest)[1]


def collapse(
    kernels: Kernels, x: jax.Array, leak: jax.Array, *, norm: bool
) -> tuple[jax.Array, jax.Array]:
    """How far the examples of a batch are from orthogonal, by layer.

    A layer is batch norm(leaky_relu(h) W). With G = h h^T of the n examples
    the gap is || G / tr(G) - I / n ||_F and the stable rank tr(G) / ||G||_2:
    n when they are orthogonal, 1 when all are multiples of one.

    Returns:
      (gap (layers,), stable rank (layers,)).
    """
    gain = 2 / (1 + leak**2)

    def layer(h, kernel):
        h = _through(jax.nn.leaky_relu(h, leak), kernel, gain)
        h = _normed(h, norm)
        g = h @ h.T
        g = g / jnp.trace(g)
        gap = jnp.linalg.norm(g - jnp.eye(len(h)) / len(h))
        return h, (gap, 1 / jnp.linalg.eigvalsh(g)[-1])

    return jax.lax.scan(layer, _start(kernels, x), kernels.rest)[1]


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
