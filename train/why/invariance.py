"""The length of a kernel under batch norm.

Claim: The loss does not depend on the length of a kernel before batch norm, and
its gradient goes with 1/length (Ioffe and Szegedy 2015, 3.3). So weight decay
is an exponentially growing learning rate (Li and Arora 2019), and each step
comes to turn kernels by the same angle, whatever the loss (Wan et al. 2021).

Published: the loss at a W is that at W, its gradient 1/a of that at W, exactly;
SGD with decay wd has the losses of SGD with rate lr (1 - lr wd)^(-2t - 1); the
angle tends to sqrt(2 lr wd) after about 1/(lr wd) steps.

Only hidden kernels are trained; in float64, but for the long runs, so that what
is exact shows as exact.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import batch_norm
from jaxbn.diagnostics import angular_update, equilibrium_angle
from train.why import nets, plots
from train.why.arms import THEORY, WITH, WITHOUT, Arm
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.nets import Norm, Sizes
from train.why.words import say

FACTORS = np.logspace(-2, 2, 17)  # on the first kernel
UNIT = 8  # the factor 1
DECAY_RATE, DECAY = 0.1, 0.05  # learning rate and weight decay
# Both, of the runs towards equilibrium.
PAIRS = ((0.1, 0.05), (0.3, 0.02), (0.3, 0.05))
EXACT = {"norm": functools.partial(batch_norm, epsilon=0.0)}
ARMS = {
    "with": WITH._replace(label="with batch norm, epsilon 0", options=EXACT),
    "epsilon": WITH._replace(label="with batch norm, epsilon 1e-5", style=":"),
    "without": WITHOUT,
}


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    pairs = PAIRS[2:] if settings.quick else PAIRS
    make = functools.partial(data.setting, settings.seeds, batch_size=64)
    sizes = data.sizes(64, 64)
    with jax.enable_x64(True):
        short = make(steps=100 if settings.quick else 400)
        numbers = {
            "factors": FACTORS,
            "scaled": each(ARMS, scaled, short, sizes=sizes),
            "decay": each(ARMS, decayed, short, sizes=sizes),
        }
    long = make(steps=max(horizon(*pair) for pair in pairs))
    numbers["pairs"] = pairs
    numbers["angles"] = {}
    for name in ("with", "without"):
        norm = batch_norm if name == "with" else None
        turn = functools.partial(angles, long, sizes=sizes, norm=norm)
        turned = jax.vmap(turn)(np.array(pairs, np.float32))
        numbers["angles"][name] = np.asarray(turned)
    return numbers | _summary(numbers)


def _start(
    setting: Setting, sizes: Sizes, norm: Norm
) -> tuple[list[jax.Array], nets.Loss]:
    """Returns the hidden kernels, and the loss as a function of them alone."""
    params = nets.init(setting.key, sizes, norm=norm)
    whole = nets.loss_on(setting.train, norm=norm)

    def loss(kernels, index):
        pairs = zip(params["hidden"], kernels)
        hidden = [layer | {"kernel": kernel} for layer, kernel in pairs]
        return whole(params | {"hidden": hidden}, index)

    return [layer["kernel"] for layer in params["hidden"]], loss


def _sgd(rate: Any, decay: jax.Array) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


@per_seed
def scaled(setting: Setting, *, sizes: Sizes, norm: Norm) -> Any:
    """Loss of a new net, and norm of the gradient of the first kernel.

    At each of FACTORS times that kernel: (factors,) each.
    """
    (first, *rest), loss = _start(setting, sizes, norm)

    def one(factor):
        given = [first * factor, *rest], setting.indices[0]
        slope = jax.value_and_grad(loss, has_aux=True)
        (value, _), gradient = slope(*given)
        return {"loss": value, "gradient": jnp.linalg.norm(gradient[0])}

    return jax.vmap(one)(FACTORS)


@per_seed
def decayed(setting: Setting, *, sizes: Sizes, norm: Norm) -> jax.Array:
    """Losses with weight decay, and with the rate in its place: (2, steps)."""
    t = np.arange(len(setting.indices))
    growing = DECAY_RATE * (1 - DECAY_RATE * DECAY) ** (-2.0 * t - 1)
    rates = np.stack([np.full(len(t), DECAY_RATE), growing])

    def one(rates, decay):
        kernels, loss = _start(setting, sizes, norm)
        sgd = _sgd(lambda step: rates[step], decay)
        return nets.train(loss, kernels, setting.indices, sgd)[1]

    return jax.vmap(one)(rates, np.array([DECAY, 0.0]))


def horizon(rate: float, decay: float) -> int:
    """Steps after which equilibrium has long been reached."""
    return round(8 / (rate * decay))


@per_seed
def angles(
    setting: Setting, pair: jax.Array, *, sizes: Sizes, norm: Norm
) -> jax.Array:
    """Angle of each step of a kernel, in radians: (steps, layers).

    Root mean square over channels.
    """

    def watch(old, new, _):
        turned = [angular_update(old, new, path=(i,)) for i in range(len(old))]
        return jnp.stack([jnp.sqrt(jnp.square(a).mean()) for a in turned])

    kernels, loss = _start(setting, sizes, norm)
    sgd = _sgd(*pair)
    return nets.train(loss, kernels, setting.indices, sgd, watch=watch)[2]


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the caption says, a number a seed."""
    found = {}
    for name, rows in numbers["scaled"].items():
        loss, gradient = rows["loss"], rows["gradient"]
        change = np.abs(loss - loss[:, [UNIT]]).max(1)
        expected = gradient[:, [UNIT]] / FACTORS
        found[f"loss_change_{name}"] = change
        found[f"gradient_error_{name}"] = np.abs(gradient / expected - 1).max(1)
    for name, losses in numbers["decay"].items():
        difference = np.abs(losses[:, 0] - losses[:, 1])
        found[f"decay_difference_{name}"] = np.nanmax(difference, 1)
    for name, runs in numbers["angles"].items():
        ratios, reached = [], []
        for pair, turned in zip(numbers["pairs"], runs):
            steps = horizon(*pair)
            late = turned[:, steps * 3 // 4 : steps]
            rms = np.sqrt(np.square(late).mean(1))
            ratios.append(rms / equilibrium_angle(*pair))
            time, ratio = _course(pair, turned)
            first = time[np.argmax(ratio > 0.9, axis=1)]
            reached.append(np.where((ratio > 0.9).any(1), first, np.nan))
        # (seeds, pairs * layers) and (seeds, pairs)
        found[f"angle_over_theory_{name}"] = np.concatenate(ratios, 1)
        found[f"reached_{name}"] = np.stack(reached, 1)
    return found


def _course(
    pair: tuple[float, float], turned: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """steps * lr * wd (60,), and the angle over that of equilibrium (S, 60).

    Root mean square over layers and a sixtieth of the run.
    """
    steps = horizon(*pair)
    width = max(steps // 60, 1)
    ends, square = plots.by_steps(np.square(turned[:, :steps]).mean(2), width)
    time = (ends / width - 0.5) * width * np.prod(pair)
    return time, np.sqrt(square) / equilibrium_angle(*pair)


def verdict(numbers: dict[str, Any]) -> str:
    ratio = numbers["angle_over_theory_with"]
    holds = (
        (numbers["loss_change_with"] < 1e-12)
        & (numbers["gradient_error_with"] < 1e-12)
        & (numbers["decay_difference_with"] < 1e-12)
        & (np.abs(ratio - 1) < 0.1).all(1)
    )
    return say(
        "with the first kernel scaled by 0.01 to 100 the loss moves by at most "
        "{loss_change_with:max} (epsilon 1e-5: {loss_change_epsilon:max}; "
        "without batch norm: {loss_change_without:max}). Weight decay and the "
        "growing rate differ in loss by at most {decay_difference_with:max} "
        "(epsilon 1e-5: {decay_difference_epsilon:max}; without: "
        "{decay_difference_without:max}). Angles settle at "
        "{angle_over_theory_with:.2f} of sqrt(2 lr wd), 0.9 of it reached "
        "after {reached_with:.1f} / (lr wd) steps; without batch norm they "
        "settle at {angle_over_theory_without:.2f}. {holds:verdict}",
        **numbers,
        holds=holds,
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    loss, gradient, decay, angle = axes
    for name, arm in ARMS.items():
        rows = numbers["scaled"][name]
        plots.lines(loss, FACTORS, rows["loss"], arm)
        plots.lines(gradient, FACTORS, rows["gradient"], arm)
        # What is equal to the last bit has no place on a logarithmic axis.
        losses = numbers["decay"][name]
        apart = np.maximum(np.abs(losses[:, 0] - losses[:, 1]), 1e-17)
        line = arm._replace(label=None)
        plots.lines(decay, np.arange(apart.shape[1]), apart, line, lw=1)
    unit = numbers["scaled"]["with"]["gradient"][0, UNIT]
    plots.theory(gradient, FACTORS, unit / FACTORS, "1/a")
    for name, runs in numbers["angles"].items():
        for pair, style, turned in zip(
            numbers["pairs"], ("-", "--", ":"), runs
        ):
            time, ratio = _course(pair, turned)
            ratio = np.sqrt(np.square(ratio).mean(0))[None]
            label = f"lr {pair[0]}, wd {pair[1]}" if name == "with" else None
            line = Arm(label, ARMS[name].color, style)
            plots.lines(angle, time, ratio, line, lw=1.5)
    angle.axhline(1, ls="--", color=THEORY, label="sqrt(2 lr wd)")
    loss.loglog()
    gradient.loglog()
    decay.semilogy()
    angle.set_ylim(0)


PANELS = (
    "Loss of a new net, its first kernel scaled | factor a on the first kernel "
    "| loss (nats)",
    "Gradient of that kernel | factor a on the first kernel | "
    "norm of the kernel's gradient",
    "Weight decay or a growing learning rate | step | "
    "|difference of losses| (nats)",
    "Angle by which a step turns the kernels | steps x lr x wd | "
    "angle / sqrt(2 lr wd)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), size=(9, 6.6)
)
