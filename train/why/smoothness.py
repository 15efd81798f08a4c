"""How far a gradient can be trusted, at equal step and at equal loss."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.why import data, deep_linear, draw, finding, landscape, noisy
from train.why.finding import Finding, Settings
from train.why.landscape import MEASURES, MOMENTS

CLAIM = (
    "Batch norm makes the loss smoother along the gradient, and that, not "
    "less internal covariate shift, is why it helps: noise behind batch norm "
    "does little harm, and the shift can even be larger with it."
)

RATE = 0.1
BATCH = 128
DEPTH = 8  # hidden layers of 64

_PREDICTIVENESS = MEASURES.index("predictiveness")
_EARLY = slice(25, 35)  # steps


def run(settings: Settings) -> Finding:
    """Probes nets of eight layers, noisy batch norm, and a deep linear net."""
    found = data.load(settings)
    steps = 160 if settings.quick else 240
    places = data.places_by_seed(
        len(found.train_y), batch_size=BATCH, steps=steps, seeds=settings.seeds
    )
    train = (found.train_x, found.train_y)
    seeds = np.asarray(settings.seeds)
    sizes = (found.train_x.shape[1], *[64] * DEPTH, found.num_classes)
    without, with_ = (
        landscape.probe(seeds, train, places, RATE, norm=norm, sizes=sizes)
        for norm in (False, True)
    )
    numbers = {
        "without": without._asdict(),
        "with": with_._asdict(),
        "ratios": landscape.ratios(without, with_),
        "noisy": noisy.measure(seeds, train, places, sizes=sizes, rate=RATE),
        "deep_linear": deep_linear.measure(seeds, quick=settings.quick),
        "chance": 1 / found.num_classes,
    }
    numbers["holds"] = _holds(numbers)
    return Finding(
        name="smoothness",
        title="How far a gradient can be trusted",
        claim=CLAIM,
        published=(
            "VGG on CIFAR-10: a smaller loss range and effective beta at "
            "each step, and a predictiveness (change of the gradient) that is "
            "smaller by close to two orders of magnitude; almost the same "
            "accuracy with noise behind batch norm, while the same noise "
            "keeps a plain net from training at all. A linear net of 25 "
            "layers: gradients before and after the step of earlier layers "
            "are almost uncorrelated with batch norm and the same without "
            "(Santurkar et al. 2018, figures 1, 2 and 4, appendix A)."
        ),
        measured=_words(numbers),
        numbers=numbers,
        draw=functools.partial(_draw, numbers),
    )


def _holds(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which claims held, on which seeds."""
    ratios, noise = numbers["ratios"], numbers["noisy"]
    last = {arm: values[:, -10:].mean(1) for arm, values in noise.items()}
    linear = numbers["deep_linear"]
    cosine = {
        side: linear[side]["cosine"].mean(2)[..., deep_linear.SHOWN]
        for side in finding.SIDES
    }
    return {
        "equal loss": ratios["equal loss"][:, _PREDICTIVENESS] > 1,
        "first step": ratios["first step"][:, _PREDICTIVENESS] > 1,
        "noise is harmless": last["with"] - last["with, noisy"] < 0.02,
        "noise stops the plain net": (
            last["without, noisy"] < 2 * numbers["chance"]
        ),
        "more shift": (cosine["with"] < cosine["without"]).all(0),
    }


def _words(numbers: dict[str, Any]) -> str:
    span, holds = finding.span, numbers["holds"]
    told = {
        moment: ", ".join(span(column, ".3g") for column in values.T)
        for moment, values in numbers["ratios"].items()
    }
    tallies = {claim: draw.tally(held) for claim, held in holds.items()}
    if np.isnan(numbers["ratios"]["equal loss"]).any():
        told["equal loss"] = (
            f"not to be had, a loss stays above {landscape.LOSS:g}"
        )
        tallies["equal loss"] = "not to be told"
    ratios = "; ".join(f"{moment} {text}" for moment, text in told.items())
    accuracy = "; ".join(
        f"{arm} {span(100 * values[:, _EARLY].mean(1), '.0f')}, "
        f"{span(100 * values[:, -10:].mean(1), '.0f')}"
        for arm, values in numbers["noisy"].items()
    )
    linear = numbers["deep_linear"]
    without, with_ = (
        span(linear[side]["cosine"].mean(2)[..., deep_linear.SHOWN], ".2f")
        for side in finding.SIDES
    )
    return (
        f"{', '.join(MEASURES)}, each without over with batch norm: {ratios}. "
        "A gradient more predictive with it: at equal loss "
        f"{tallies['equal loss']}, at the first step {tallies['first step']}. "
        f"Training accuracy (%) at step 30 and at the end: {accuracy}. Noise "
        "behind batch norm costs less than two points: "
        f"{tallies['noise is harmless']}; it keeps the plain net at chance: "
        f"{tallies['noise stops the plain net']}. Cosine in layer "
        f"{deep_linear.SHOWN + 1} of the linear net {without} without, "
        f"{with_} with; lower with at both rates: {tallies['more shift']}."
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(11, 6.4)
    axes = figure.subplots(2, 3)
    _draw_steps(numbers, axes[0, 0])
    _draw_losses(numbers, axes[0, 1])
    _draw_ratios(numbers, axes[0, 2])
    _draw_noise(numbers, axes[1, 0])
    _draw_shift(numbers, axes[1, 1])
    _draw_linear(numbers, axes[1, 2])


def _draw_steps(numbers: dict[str, Any], axes: Any) -> None:
    for side, (color, label) in finding.SIDES.items():
        values = np.asarray(numbers[side]["measures"])[..., _PREDICTIVENESS]
        steps = landscape.EVERY * np.arange(values.shape[1])
        draw.band(axes, steps, values, color=color, label=label)
    axes.set(
        title="At equal step",
        xlabel="step",
        ylabel="change of the gradient on the line",
        yscale="log",
    )
    axes.legend()


def _draw_losses(numbers: dict[str, Any], axes: Any) -> None:
    for side, (color, label) in finding.SIDES.items():
        values = np.asarray(numbers[side]["measures"])[..., _PREDICTIVENESS]
        losses = np.asarray(numbers[side]["loss"])
        axes.plot(losses, values, ".", color=color, alpha=0.35, markersize=4)
        axes.plot([], [], "o", color=color, markersize=4, label=label)
    axes.axvline(landscape.LOSS, color=finding.THEORY, lw=0.8, ls=":")
    axes.set(
        title="At equal loss",
        xlabel="training loss (nats), falls to the right",
        ylabel="change of the gradient on the line",
        xscale="log",
        yscale="log",
    )
    axes.invert_xaxis()
    axes.legend()


def _draw_ratios(numbers: dict[str, Any], axes: Any) -> None:
    colors = (finding.FOURTH, finding.THIRD, finding.THEORY)
    for i, (name, color) in enumerate(zip(MEASURES, colors)):
        for j, moment in enumerate(MOMENTS):
            values = numbers["ratios"][moment][:, i]
            place = np.full(len(values), j + 0.22 * (i - 1))
            axes.plot(place, values, "o", color=color, markersize=5, alpha=0.8)
        axes.plot([], [], "o", color=color, markersize=5, label=name)
    axes.axhline(1, color=finding.THEORY, lw=0.8, ls=":")
    for y, word, edge in ((1.1, "with", "bottom"), (0.9, "without", "top")):
        axes.text(-0.45, y, f"smoother {word}", va=edge, fontsize=8)
    axes.set(title="Without over with", ylabel="ratio", yscale="log")
    axes.set_xticks(range(len(MOMENTS)), MOMENTS)
    axes.set_xlim(-0.5, 2.5)
    axes.legend(loc="lower right")


def _draw_noise(numbers: dict[str, Any], axes: Any) -> None:
    for arm, values in numbers["noisy"].items():
        side, _, noise = arm.partition(", ")
        color, label = finding.SIDES[side]
        steps, means = draw.by_steps(100 * values, 10)
        draw.band(
            axes,
            steps,
            means,
            color=color,
            label=f"{label}, {noise}" if noise else label,
            style="--" if noise else "-",
        )
    axes.set(
        title="Noise behind batch norm",
        xlabel="step",
        ylabel="training accuracy (%)",
        ylim=(0, 103),
    )
    axes.legend(loc="lower right")


def _draw_shift(numbers: dict[str, Any], axes: Any) -> None:
    linear = numbers["deep_linear"]
    layers = np.arange(1, deep_linear.LAYERS + 1)
    for side, (color, label) in finding.SIDES.items():
        for rate, cosine, style in zip(
            linear["rates"], linear[side]["cosine"], ("--", "-")
        ):
            name = f"{label}, rate {rate:.0e}"
            draw.band(
                axes,
                layers,
                cosine.mean(1),
                color=color,
                label=name,
                style=style,
            )
    axes.axhline(0, color=finding.THEORY, lw=0.8, ls=":")
    axes.set(
        title="Linear net: gradients before and after",
        xlabel="layer",
        ylabel="cosine, mean over the run",
        ylim=(-1.05, 1.05),
    )
    axes.legend(loc="lower left")


def _draw_linear(numbers: dict[str, Any], axes: Any) -> None:
    linear = numbers["deep_linear"]
    for side, (color, _) in finding.SIDES.items():
        for losses, style in zip(linear[side]["loss"], ("--", "-")):
            steps = np.arange(1, losses.shape[1])
            draw.band(
                axes, steps, losses[:, 1:] / 1000, color=color, style=style
            )
    axes.set(
        title="Linear net: training",
        xlabel="step",
        ylabel="loss (squared error, thousands)",
    )
