"""How far a gradient can be trusted.

Claim: Batch norm makes the loss smoother along the gradient, and that, not less
internal covariate shift, is why it helps: noise behind batch norm does little
harm, and the shift can even be larger with it.

Published: VGG on CIFAR-10: a smaller loss range and effective beta at each
step, and a predictiveness (change of the gradient) that is smaller by close to
two orders of magnitude; almost the same accuracy with noise behind batch norm,
while the same noise keeps a plain net from training at all. A linear net of 25
layers: gradients before and after the step of earlier layers are almost
uncorrelated with batch norm and the same without (Santurkar et al. 2018,
figures 1, 2 and 4, appendix A).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from train.why import landscape, plots
from train.why.arms import ARMS, FOURTH, THEORY, THIRD, Arm
from train.why.data import Data, Settings
from train.why.experiment import Experiment, each
from train.why.landscape import MEASURES, MOMENTS, NOISY_ARMS
from train.why.words import say

SHOWN = 16  # the layer of the linear net with figures, counted from 0
_PREDICTIVENESS = MEASURES.index("predictiveness")


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Probes nets of eight layers, noisy batch norm, and a deep linear net."""
    steps = 160 if settings.quick else 240
    setting = data.setting(settings.seeds, steps=steps, batch_size=128)
    sizes = data.sizes(*[64] * 8)
    probes = each(ARMS, landscape.probe, setting, sizes=sizes)
    numbers = {
        **{name: found._asdict() for name, found in probes.items()},
        "ratios": landscape.ratios(probes["without"], probes["with"]),
        "noisy": each(NOISY_ARMS, landscape.train, setting, sizes=sizes),
        "deep_linear": linear(setting.key, steps=90 if settings.quick else 300),
        "chance": 1 / data.num_classes,
    }
    return numbers | {"holds": _holds(numbers)}


def linear(keys: jax.Array, *, steps: int) -> dict[str, Any]:
    """Results of `landscape.linear`, (rates, seeds, ...) of both arms."""
    rates, every = landscape.LINEAR_RATES, landscape.INTERVAL

    def both(**options: Any) -> Any:
        return jax.vmap(lambda rate: landscape.linear(keys, rate, **options))(
            np.array(rates, np.float32)
        )

    found = each(ARMS, both, intervals=steps // every)
    return {"rates": rates, "steps": steps, "every": every, **found}


def _cosine(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    """In layer SHOWN of the linear net, mean over the run: (rates, S)."""
    found = {arm: numbers["deep_linear"][arm]["cosine"] for arm in ARMS}
    return {arm: rows.mean(2)[..., SHOWN] for arm, rows in found.items()}


def _accuracy(numbers: dict[str, Any], steps: slice) -> dict[str, np.ndarray]:
    return {a: rows[:, steps].mean(1) for a, rows in numbers["noisy"].items()}


def _holds(numbers: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which claims held, on which seeds."""
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


def verdict(numbers: dict[str, Any]) -> str:
    ratios = numbers["ratios"]
    columns = {
        moment: ", ".join(f"{{r[{moment}][{i}]}}" for i in range(len(MEASURES)))
        for moment in MOMENTS
    }
    at_equal_loss = "{holds[equal loss]:tally}"
    if np.isnan(ratios["equal loss"]).any():
        columns["equal loss"] = (
            f"not to be had, a loss stays above {landscape.LOSS:g}"
        )
        at_equal_loss = "not to be told"
    moments = "; ".join(f"{moment} {text}" for moment, text in columns.items())
    accuracy = "; ".join(
        f"{arm} {{early[{arm}]:percent}}, {{late[{arm}]:percent}}"
        for arm in NOISY_ARMS
    )
    return say(
        f"{', '.join(MEASURES)}, each without over with batch norm: {moments}. "
        "A gradient more predictive with it: at equal loss "
        f"{at_equal_loss}, at the first step {{holds[first step]:tally}}. "
        f"Training accuracy (%) at step 30 and at the end: {accuracy}. Noise "
        "behind batch norm costs less than two points: "
        "{holds[noise is harmless]:tally}; it keeps the plain net at chance: "
        "{holds[noise stops the plain net]:tally}. Cosine in layer "
        f"{SHOWN + 1} of the linear net "
        "{cosine[without]:.2f} without, {cosine[with]:.2f} with; lower with at "
        "both rates: {holds[more shift]:tally}.",
        r={moment: values.T for moment, values in ratios.items()},
        holds=numbers["holds"],
        early=_accuracy(numbers, slice(25, 35)),
        late=_accuracy(numbers, slice(-10, None)),
        cosine=_cosine(numbers),
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    by_step, by_loss, ratios, noise, shift, training = axes
    for name, arm in ARMS.items():
        values = numbers[name]["measures"][..., _PREDICTIVENESS]
        steps = landscape.EVERY * np.arange(values.shape[1])
        plots.band(by_step, steps, values, arm)
        dots = {"ls": "", "marker": ".", "alpha": 0.35, "ms": 4}
        losses = numbers[name]["loss"]
        by_loss.plot(losses.T, values.T, color=arm.color, **dots)
        by_loss.plot([], [], "o", color=arm.color, ms=4, label=arm.label)
        _draw_linear(shift, training, numbers["deep_linear"], name)
    for name, arm in NOISY_ARMS.items():
        steps, means = plots.by_steps(100 * numbers["noisy"][name], 10)
        plots.band(noise, steps, means, arm)
    _draw_ratios(ratios, numbers["ratios"])
    by_loss.axvline(landscape.LOSS, color=THEORY, lw=0.8, ls=":")
    by_step.semilogy()
    by_loss.loglog()
    by_loss.invert_xaxis()
    noise.set_ylim(0, 103)
    shift.set_ylim(-1.05, 1.05)
    plots.level(shift, 0)


def _draw_linear(
    shift: Any, training: Any, found: dict[str, Any], name: str
) -> None:
    layers = np.arange(1, landscape.LAYERS + 1)
    for i, style in enumerate(("--", "-")):
        label = f"{ARMS[name].label}, rate {found['rates'][i]:.0e}"
        line = ARMS[name]._replace(label=label, style=style)
        plots.band(shift, layers, found[name]["cosine"][i].mean(1), line)
        losses = found[name]["loss"][i][:, 1:] / 1000
        steps = np.arange(1, losses.shape[1] + 1)
        plots.band(training, steps, losses, line._replace(label=None))


def _draw_ratios(axes: Any, ratios: dict[str, np.ndarray]) -> None:
    for i, (name, color) in enumerate(zip(MEASURES, (FOURTH, THIRD, THEORY))):
        x = np.arange(len(MOMENTS)) + 0.22 * (i - 1)
        values = np.stack([ratios[moment][:, i] for moment in MOMENTS], 1)
        plots.lines(axes, x, values, Arm(name, color, "o"), ms=5, alpha=0.8)
    plots.level(axes, 1)
    for y, word, edge in ((1.1, "with", "bottom"), (0.9, "without", "top")):
        axes.text(-0.45, y, f"smoother {word}", va=edge, fontsize=8)
    axes.set_xticks(range(len(MOMENTS)), MOMENTS)
    axes.set_xlim(-0.5, 2.5)
    axes.semilogy()


PANELS = (
    "At equal step | step | change of the gradient on the line",
    "At equal loss | training loss (nats), falls to the right | "
    "change of the gradient on the line",
    "Without over with |  | ratio",
    "Noise behind batch norm | step | training accuracy (%)",
    "Linear net: gradients before and after | layer | "
    "cosine, mean over the run",
    "Linear net: training | step | loss (squared error, thousands)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 3), size=(11, 6.4)
)
