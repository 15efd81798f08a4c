"""Under batch norm the length of a kernel is a learning rate, not a function.

In float64, but for the long runs, so
that what is exact shows as exact.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxbn.diagnostics import equilibrium_angle
from train.why import plots
from train.why.arms import THEORY, WITH, WITHOUT, Arm, each
from train.why.data import Data, Settings
from train.why.experiment import Experiment, say
from train.why.lengths import FACTORS, angles, decayed, horizon, scaled

# Learning rate and weight decay of the runs towards equilibrium.
PAIRS = ((0.1, 0.05), (0.3, 0.02), (0.3, 0.05))

ARMS = {
    "with": WITH._replace(
        label="with batch norm, epsilon 0",
        options={"norm": True, "epsilon": 0.0},
    ),
    "epsilon": WITH._replace(
        label="with batch norm, epsilon 1e-5",
        style=":",
        options={"norm": True, "epsilon": 1e-5},
    ),
    "without": WITHOUT._replace(options={"norm": False, "epsilon": 0.0}),
}


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    pairs = PAIRS[2:] if settings.quick else PAIRS
    with jax.enable_x64(True):
        numbers = {
            "factors": FACTORS,
            "scaled": each(ARMS, scaled, settings, data),
            "decay": each(ARMS, decayed, settings, data),
        }
    numbers["pairs"] = pairs
    numbers["angles"] = {
        name: angles(settings, data, pairs, norm=name == "with")
        for name in ("with", "without")
    }
    return numbers | _summary(numbers)


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the caption says, a number a seed."""
    unit = np.searchsorted(FACTORS, 1 - 1e-9)
    found = {}
    for name, rows in numbers["scaled"].items():
        loss, gradient = rows["loss"], rows["gradient"]
        change = np.abs(loss - loss[:, [unit]]).max(1)
        expected = gradient[:, [unit]] / FACTORS
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
    """Angle over that of equilibrium, smoothed.

    Root mean square over layers and a sixtieth of the run.

    Returns:
      (steps * lr * wd (60,), ratio (S, 60)).
    """
    steps = horizon(*pair)
    width = max(steps // 60, 1)
    square = np.square(turned[:, : steps // width * width]).mean(2)
    square = square.reshape(len(square), -1, width).mean(2)
    time = (np.arange(square.shape[1]) + 0.5) * width * np.prod(pair)
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
    middle = numbers["scaled"]["with"]["gradient"][0]
    unit = middle[len(middle) // 2]
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


_FACTOR = "factor a on the first kernel"
EXPERIMENT = Experiment(
    "invariance",
    "The length of a kernel under batch norm",
    claim=(
        "The loss does not depend on the length of a kernel before batch norm, "
        "and its gradient goes with 1/length (Ioffe and Szegedy 2015, 3.3). So "
        "weight decay is an exponentially growing learning rate (Li and Arora "
        "2019), and each step comes to turn kernels by the same angle, "
        "whatever the loss (Wan et al. 2021)."
    ),
    published=(
        "the loss at a W is that at W, its gradient 1/a of that at W, exactly; "
        "SGD with decay wd has the losses of SGD with rate lr (1 - lr wd)^(-2t "
        "- 1); the angle tends to sqrt(2 lr wd) after about 1/(lr wd) steps."
    ),
    measure=measure,
    verdict=verdict,
    draw=draw,
    panels=(
        f"Loss of a new net, its first kernel scaled | {_FACTOR} | loss (nats)",
        f"Gradient of that kernel | {_FACTOR} | norm of the kernel's gradient",
        "Weight decay or a growing learning rate | step | "
        "|difference of losses| (nats)",
        "Angle by which a step turns the kernels | steps x lr x wd | "
        "angle / sqrt(2 lr wd)",
    ),
    shape=(2, 2),
    size=(9, 6.6),
)
