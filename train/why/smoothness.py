"""Smoothness of the loss along the gradient.

Claim: Batch norm makes the loss smoother along the gradient, and this, not a
reduction of internal covariate shift, is why it helps: noise added after batch
norm does little harm, and the shift can be larger with it.

Published: VGG on CIFAR-10 with batch norm has a smaller range of losses and a
smaller effective beta in each step, and a predictiveness (change of the
gradient) that is smaller by almost two orders of magnitude. Noise after batch
norm hardly changes the accuracy, while a network without batch norm does not
train with it. In a linear network of 25 layers, the gradients before and after
an update of earlier layers are almost uncorrelated with batch norm and equal
without (Santurkar et al. 2018, figures 1, 2 and 4, appendix A).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from train.why import landscape, plots
from train.why.data import Data, Settings
from train.why.experiment import Experiment, each
from train.why.landscape import MEASURES, MOMENTS, NOISY_METHODS
from train.why.methods import FOURTH, METHODS, THEORY, THIRD, Method
from train.why.words import held, percent, span

SHOWN = 16  # the layer of the linear network whose cosine is reported, from 0
_PREDICTIVENESS = MEASURES.index("predictiveness")


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Probes networks of eight layers, noise, and a deep linear network."""
    steps = 160 if settings.quick else 240
    setting = data.setting(settings.seeds, steps=steps, batch_size=128)
    sizes = data.sizes(*[64] * 8)
    probes = each(METHODS, landscape.probe, setting, sizes=sizes)
    numbers = {
        **{name: found._asdict() for name, found in probes.items()},
        "ratios": landscape.ratios(probes["without"], probes["with"]),
        "noisy": each(NOISY_METHODS, landscape.train, setting, sizes=sizes),
        "deep_linear": linear(setting.key, steps=90 if settings.quick else 300),
        "chance": 1 / data.num_classes,
    }
    return numbers | {"holds": _holds(numbers)}


def linear(keys: jax.Array, *, steps: int) -> dict[str, Any]:
    """Results of `landscape.linear`, (rates, seeds, ...) of both methods."""
    rates = landscape.LINEAR_RATES

    def both(**options: Any) -> Any:
        return jax.vmap(lambda rate: landscape.linear(keys, rate, **options))(
            np.array(rates, np.float32)
        )

    found = each(METHODS, both, intervals=steps // landscape.INTERVAL)
    return {"rates": rates, **found}


def _cosine(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    """In layer SHOWN of the linear network, mean over the run: (rates, S)."""
    found = {name: numbers["deep_linear"][name]["cosine"] for name in METHODS}
    return {name: rows.mean(2)[..., SHOWN] for name, rows in found.items()}


def _accuracy(numbers: dict[str, Any], steps: slice) -> dict[str, np.ndarray]:
    noisy = numbers["noisy"]
    return {name: rows[:, steps].mean(1) for name, rows in noisy.items()}


def _holds(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which claims held, for each seed."""
    ratios, cosine = numbers["ratios"], _cosine(numbers)
    last = _accuracy(numbers, slice(-10, None))
    return {
        "equal loss": ratios["equal loss"][:, _PREDICTIVENESS] > 1,
        "first step": ratios["first step"][:, _PREDICTIVENESS] > 1,
        "noise is harmless": last["with"] - last["with, noisy"] < 0.02,
        "noise stops the plain net": (
            last["without, noisy"] < 2 * numbers["chance"]
        ),
        "more shift": (cosine["with"] < cosine["without"]).all(0),
    }


def verdict(numbers: dict[str, Any]) -> list[str]:
    ratios, holds = numbers["ratios"], numbers["holds"]
    sentences = []
    for moment in MOMENTS:
        if np.isnan(ratios[moment]).any():
            sentences.append(
                f"{moment.capitalize()}: not comparable, a loss stays above "
                f"{landscape.LOSS:g}."
            )
            continue
        found = ", ".join(
            f"{name} {span(column)}"
            for name, column in zip(MEASURES, ratios[moment].T)
        )
        sentence = (
            f"{moment.capitalize()}, ratios without / with batch norm: {found}."
        )
        if moment in holds:
            claim = "Gradients are more predictive with batch norm"
            sentence += f" {held(claim, holds[moment])}"
        sentences.append(sentence)
    early, late = slice(25, 35), slice(-10, None)
    accuracy = "; ".join(
        f"{NOISY_METHODS[name].label}, {percent(start)} and {percent(end)}"
        for (name, start), end in zip(
            _accuracy(numbers, early).items(), _accuracy(numbers, late).values()
        )
    )
    cosine = _cosine(numbers)
    return [
        *sentences,
        f"Training accuracy after 30 steps and at the end: {accuracy}.",
        held(
            "Noise after batch norm costs less than two points",
            holds["noise is harmless"],
        ),
        held(
            "With noise, the network without batch norm stays at chance",
            holds["noise stops the plain net"],
        ),
        f"Cosine in layer {SHOWN + 1} of the linear network: "
        f"{span(cosine['with'], '.2f')} with batch norm, "
        f"{span(cosine['without'], '.2f')} without. "
        + held("Lower with it at both learning rates", holds["more shift"]),
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    by_step, by_loss, ratios, noise, shift, training = axes
    for name, method in METHODS.items():
        values = numbers[name]["measures"][..., _PREDICTIVENESS]
        steps = landscape.EVERY * np.arange(values.shape[1])
        plots.band(by_step, steps, values, method)
        dots = {"ls": "", "marker": ".", "alpha": 0.35, "ms": 4}
        losses = numbers[name]["loss"]
        by_loss.plot(losses.T, values.T, color=method.color, **dots)
        _draw_linear(shift, training, numbers["deep_linear"], name)
    for name, method in NOISY_METHODS.items():
        steps, means = plots.by_steps(100 * numbers["noisy"][name], 10)
        plots.band(noise, steps, means, method)
    _draw_ratios(ratios, numbers["ratios"])
    by_loss.axvline(landscape.LOSS, color=THEORY, lw=0.8, ls=":")
    by_step.semilogy()
    by_loss.loglog()
    by_loss.invert_xaxis()
    noise.set_ylim(0, 103)
    shift.set_ylim(-1.05, 1.05)
    plots.level(shift, 0)
    plots.name(by_loss, 0.55, 0.85, METHODS["without"])
    plots.name(by_loss, 0.35, 0.2, METHODS["with"])
    for place in (ratios, noise, training):
        place.legend()


def _draw_linear(
    shift: Any, training: Any, found: dict[str, Any], name: str
) -> None:
    layers = np.arange(1, landscape.LAYERS + 1)
    for i, style in enumerate(("--", "-")):
        label = f"{METHODS[name].label}, lr {found['rates'][i]:.0e}"
        line = METHODS[name]._replace(label=label, style=style)
        cosine = found[name]["cosine"][i].mean(1)
        plots.band(shift, layers, cosine, line)
        losses = found[name]["loss"][i][:, 1:] / 1000
        steps = np.arange(1, losses.shape[1] + 1)
        plots.band(training, steps, losses, line)


def _draw_ratios(axes: Any, ratios: dict[str, np.ndarray]) -> None:
    for i, (name, color) in enumerate(zip(MEASURES, (FOURTH, THIRD, THEORY))):
        x = np.arange(len(MOMENTS)) + 0.22 * (i - 1)
        values = np.stack([ratios[moment][:, i] for moment in MOMENTS], 1)
        plots.lines(axes, x, values, Method(name, color, "o"), ms=5, alpha=0.8)
    plots.level(axes, 1)
    axes.set_xticks(range(len(MOMENTS)), MOMENTS)
    axes.set_xlim(-0.5, 2.5)
    axes.semilogy()


PANELS = (
    "Predictiveness, by step | step | change of the gradient",
    "The same, by loss | training loss (nats) | change of the gradient",
    "Without / with batch norm |  | ratio (above 1: smoother with)",
    "Noise after batch norm | step | training accuracy (%)",
    "Linear network: shift | layer | cosine of gradients",
    "Linear network: training | step | squared error (thousands)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(3, 2), height=7.8
)
