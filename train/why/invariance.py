"""Under batch norm the length of a kernel is a learning rate, not a function.

In float64, but for the long runs, so that what is exact shows as exact.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxbn.diagnostics import equilibrium_angle
from train.why import data, finding
from train.why.finding import Finding, Settings
from train.why.lengths import FACTORS, angles, decayed, horizon, scaled

CLAIM = (
    "The loss does not depend on the length of a kernel before batch norm, and "
    "its gradient goes with 1/length (Ioffe and Szegedy 2015, 3.3). So weight "
    "decay is an exponentially growing learning rate (Li and Arora 2019), and "
    "each step comes to turn kernels by the same angle, whatever the loss (Wan "
    "et al. 2021)."
)
PUBLISHED = (
    "the loss at a W is that at W, its gradient 1/a of that at W, exactly; "
    "SGD with decay wd has the losses of SGD with rate "
    "lr (1 - lr wd)^(-2t - 1); the angle tends to sqrt(2 lr wd) after about "
    "1/(lr wd) steps."
)

# Learning rate and weight decay of the runs towards equilibrium.
PAIRS = ((0.1, 0.05), (0.3, 0.02), (0.3, 0.05))
# Whether there is batch norm, and its epsilon.
NETS = {"with": (True, 0.0), "epsilon": (True, 1e-5), "without": (False, 0.0)}


def run(settings: Settings) -> Finding:
    found = data.load(settings)
    with jax.enable_x64(True):
        numbers = {
            "factors": FACTORS,
            "scaled": {
                name: scaled(settings, found, *net)._asdict()
                for name, net in NETS.items()
            },
            "decay": {
                name: decayed(settings, found, *net)
                for name, net in NETS.items()
            },
        }
    numbers["pairs"] = PAIRS[2:] if settings.quick else PAIRS
    numbers["angles"] = {
        name: angles(settings, found, numbers["pairs"], NETS[name][0])
        for name in ("with", "without")
    }
    numbers |= _summary(numbers)
    return Finding(
        "invariance",
        "The length of a kernel under batch norm",
        CLAIM,
        PUBLISHED,
        _words(numbers),
        numbers,
        functools.partial(_draw, numbers),
    )


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the caption tells, a number a seed."""
    unit = np.searchsorted(FACTORS, 1 - 1e-9)
    told = {}
    for name, rows in numbers["scaled"].items():
        loss, gradient = rows["loss"], rows["gradient"]
        change = np.abs(loss - loss[:, [unit]]).max(1)
        expected = gradient[:, [unit]] / FACTORS
        told[f"loss_change_{name}"] = change
        told[f"gradient_error_{name}"] = np.abs(gradient / expected - 1).max(1)
    for name, losses in numbers["decay"].items():
        apart = np.abs(losses[:, 0] - losses[:, 1])
        told[f"decay_difference_{name}"] = np.nanmax(apart, 1)
    for name, runs in numbers["angles"].items():
        ratios, reached = [], []
        for pair, turned in zip(numbers["pairs"], runs):
            steps = horizon(*pair)
            late = turned[:, steps * 3 // 4 : steps]
            ratios.append(
                np.sqrt(np.square(late).mean(1)) / equilibrium_angle(*pair)
            )
            time, ratio = _course(pair, turned)
            first = time[np.argmax(ratio > 0.9, axis=1)]
            reached.append(np.where((ratio > 0.9).any(1), first, np.nan))
        # (seeds, pairs * layers) and (seeds, pairs)
        told[f"angle_over_theory_{name}"] = np.concatenate(ratios, 1)
        told[f"reached_{name}"] = np.stack(reached, 1)
    return told


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


def _words(numbers: dict[str, Any]) -> str:
    ratio = numbers["angle_over_theory_with"]
    holds = (
        (numbers["loss_change_with"] < 1e-12)
        & (numbers["gradient_error_with"] < 1e-12)
        & (numbers["decay_difference_with"] < 1e-12)
        & (np.abs(ratio - 1) < 0.1).all(1)
    )

    def worst(key: str) -> str:
        return finding.number(np.max(numbers[key]))

    return (
        "with the first kernel scaled by 0.01 to 100 the loss moves by at most "
        f"{worst('loss_change_with')} (epsilon 1e-5: "
        f"{worst('loss_change_epsilon')}; without batch norm: "
        f"{worst('loss_change_without')}). Weight decay and the growing rate "
        "differ in loss by at most "
        f"{worst('decay_difference_with')} (epsilon 1e-5: "
        f"{worst('decay_difference_epsilon')}; without: "
        f"{worst('decay_difference_without')}). Angles settle at "
        f"{finding.span(ratio, '.2f')} of sqrt(2 lr wd), 0.9 of it reached "
        f"after {finding.span(numbers['reached_with'], '.1f')} / (lr wd) "
        "steps; without batch norm they settle at "
        f"{finding.span(numbers['angle_over_theory_without'], '.2f')}. "
        + finding.verdict(holds)
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(9, 6.6)
    (loss, gradient), (decay, angle) = figure.subplots(2, 2)
    styles = {
        "with": (finding.WITH, "-", "with batch norm, epsilon 0"),
        "epsilon": (finding.WITH, ":", "with batch norm, epsilon 1e-5"),
        "without": (finding.WITHOUT, "-", finding.WITHOUT_LABEL),
    }
    factors = numbers["factors"]
    for name, (color, line, label) in styles.items():
        rows = numbers["scaled"][name]
        for seed, (value, norm) in enumerate(
            zip(rows["loss"], rows["gradient"])
        ):
            kept = {"color": color, "ls": line, "alpha": 0.8}
            shown = label if seed == 0 else None
            loss.loglog(factors, value, label=shown, **kept)
            gradient.loglog(factors, norm, label=shown, **kept)
    middle = numbers["scaled"]["with"]["gradient"][0]
    unit = middle[len(middle) // 2]
    gradient.loglog(
        factors, unit / factors, "--", color=finding.THEORY, label="1/a"
    )
    loss.set(xlabel="factor a on the first kernel", ylabel="loss (nats)")
    gradient.set(
        xlabel="factor a on the first kernel",
        ylabel="norm of the kernel's gradient",
    )
    loss.set_title("Loss of a new net, its first kernel scaled")
    gradient.set_title("Gradient of that kernel")
    loss.legend()
    gradient.legend()
    _draw_decay(numbers, styles, decay)
    _draw_angles(numbers, angle)


def _draw_decay(numbers: dict[str, Any], styles: dict, axes: Any) -> None:
    for name, (color, line, _) in styles.items():
        losses = numbers["decay"][name]
        apart = np.abs(losses[:, 0] - losses[:, 1])
        # What is equal to the last bit has no place on a logarithmic axis.
        axes.semilogy(
            np.maximum(apart, 1e-17).T, color=color, ls=line, lw=1, alpha=0.7
        )
    axes.set(xlabel="step", ylabel="|difference of losses| (nats)")
    axes.set_title("Weight decay or a growing learning rate")


def _draw_angles(numbers: dict[str, Any], axes: Any) -> None:
    axes.axhline(1, ls="--", color=finding.THEORY, label="sqrt(2 lr wd)")
    lines = ("-", "--", ":")
    for name, color in (("with", finding.WITH), ("without", finding.WITHOUT)):
        for pair, line, turned in zip(
            numbers["pairs"], lines, numbers["angles"][name]
        ):
            time, ratio = _course(pair, turned)
            ratio = np.sqrt(np.square(ratio).mean(0))
            label = f"lr {pair[0]}, wd {pair[1]}" if name == "with" else None
            axes.plot(time, ratio, line, color=color, lw=1.5, label=label)
    axes.set(xlabel="steps x lr x wd", ylabel="angle / sqrt(2 lr wd)")
    axes.set_ylim(0)
    axes.set_title("Angle by which a step turns the kernels")
    axes.legend(loc="center right")
