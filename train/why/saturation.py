"""Saturation of sigmoid and tanh units.

Claim: Without batch norm, the inputs of sigmoid and tanh units move into the
saturated range, where gradients vanish; batch norm prevents this.

Published: Inception with sigmoids stays at chance (0.1%) without batch norm and
reaches 69.8% with it; percentiles of the input of a sigmoid are stable with it
and drift without (Ioffe and Szegedy 2015, section 4.2.2 and figure 1). The last
hidden layer of a sigmoid network is soon saturated at 0, and with five layers
does not recover (Glorot and Bengio 2010, section 3.1).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import diagnostics
from train.why import nets, plots
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.methods import METHODS
from train.why.nets import Norm
from train.why.words import held, percent, span

FLAT = 0.1  # a unit with a smaller slope, relative to the largest, is saturated
# |input| with that slope: tanh' = 1 / cosh(h)^2, and a sigmoid is a tanh of
# half its input.
_BEND = math.acosh(FLAT**-0.5)


class Kind(NamedTuple):
    """A network, by its activation."""

    activation: Any
    limit: float
    depth: int
    rate: float


KINDS = {
    "sigmoid": Kind(jax.nn.sigmoid, 2 * _BEND, 5, 1.0),
    "tanh": Kind(jnp.tanh, _BEND, 8, 0.1),
}
_FACTORS = (1.0, 3.0)  # of the initial weights, for tanh
_EVERY = 25  # steps between two probes
_EXAMPLES = 512  # training images of a probe
_PERCENTILES = (15, 50, 85)


class Probes(NamedTuple):
    """Along one run, every 25 steps."""

    accuracy: jax.Array  # (P,) on training images, with their statistics
    saturated: jax.Array  # (P, L) fraction of the units of a layer
    inputs: jax.Array  # (P, 3) percentiles of the inputs of the last layer
    slope: jax.Array  # (P,) mean slope there, relative to the largest


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains sigmoid networks, and tanh networks from two initial scales."""
    steps = 300 if settings.quick else 1000
    setting = data.setting(settings.seeds, steps=steps, batch_size=64)
    runs = [
        each(METHODS, train, setting, factor, kind=kind, ends=data.sizes())
        for kind, factor in (("sigmoid", 1.0), *(("tanh", f) for f in _FACTORS))
    ]
    numbers: dict[str, Any] = {
        "steps": np.arange(0, steps, _EVERY),
        "chance": 1 / data.num_classes,
    }
    for name in METHODS:
        sigmoid, *tanh = (run[name] for run in runs)
        both = jax.tree.map(lambda *a: np.stack(a), *tanh)
        numbers[name] = {"sigmoid": sigmoid._asdict(), "tanh": both._asdict()}
    return numbers | {"summary": _summary(numbers)}


@per_seed
def train(
    setting: Setting, factor: Any, *, norm: Norm, kind: str, ends: tuple
) -> Probes:
    """Trains from initial weights that are multiplied by factor."""
    activation, limit, depth, rate = KINDS[kind]
    options = {"norm": norm, "activation": activation}
    x, labels = (
        a[:: max(1, len(a) // _EXAMPLES)][:_EXAMPLES] for a in setting.train
    )
    slope = jax.grad(activation)
    loss = nets.loss_on(setting.train, **options)

    def interval(params, indices):
        logits, _, inputs = nets.apply(params, x, **options)
        seen = Probes(
            (logits.argmax(-1) == labels).mean(),
            diagnostics.activation_stats(inputs, limit=limit).saturated,
            jnp.percentile(inputs[-1], jnp.asarray(_PERCENTILES)),
            jax.vmap(slope)(inputs[-1].reshape(-1)).mean() / slope(0.0),
        )
        return nets.train(loss, params, indices, optax.sgd(rate))[0], seen

    sizes = (ends[0], *[64] * depth, ends[1])
    start = {"norm": norm, "gain": "lecun", "factor": factor}
    params = nets.init(setting.key, sizes, **start)
    intervals = nets.intervals(setting.indices, _EVERY)
    return jax.lax.scan(interval, params, intervals)[1]


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """After training, (S,) each; of tanh networks (factors, S)."""
    found: dict[str, Any] = {}
    for name in METHODS:
        sigmoid, tanh = numbers[name]["sigmoid"], numbers[name]["tanh"]
        found[name] = {
            "accuracy": sigmoid["accuracy"][:, -1],
            "input": sigmoid["inputs"][:, -1, 1],
            "slope": sigmoid["slope"][:, -1],
            "tanh_accuracy": tanh["accuracy"][..., -1],
            "tanh_saturated": tanh["saturated"][:, :, -1].mean(-1),
        }
    without, with_ = found["without"], found["with"]
    fewer = with_["tanh_saturated"] < without["tanh_saturated"]
    found["holds"] = {
        "sigmoid": (with_["accuracy"] > 0.9)
        & (without["accuracy"] < 2 * numbers["chance"]),
        "slope": with_["slope"] > without["slope"],
        "tanh": dict(zip(map(str, _FACTORS), fewer)),
    }
    return found


def verdict(numbers: dict[str, Any]) -> list[str]:
    found = numbers["summary"]
    without, with_, holds = found["without"], found["with"], found["holds"]
    sentences = [
        "Five sigmoid layers reach a training accuracy of "
        f"{percent(with_['accuracy'])} with batch norm and of "
        f"{percent(without['accuracy'])} without. "
        + held("They learn only with it", holds["sigmoid"]),
        "The median input of the last sigmoids is "
        f"{span(with_['input'], '.1f')} with batch norm and "
        f"{span(without['input'], '.1f')} without; their mean slope, relative "
        f"to the largest, {span(with_['slope'], '.2f')} and "
        f"{span(without['slope'], '.2f')}.",
    ]
    for i, factor in enumerate(_FACTORS):
        saturated, accuracy = (
            [percent(method[f"tanh_{key}"][i]) for method in (with_, without)]
            for key in ("saturated", "accuracy")
        )
        sentences.append(
            f"Of the units in eight tanh layers, initial weights x{factor:g}, "
            f"{saturated[0]} are saturated with batch norm and {saturated[1]} "
            f"without; the accuracies are {accuracy[0]} and {accuracy[1]}. "
            + held("Fewer with it", holds["tanh"][str(factor)])
        )
    return sentences


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    accuracy, inputs, saturated, by_layer = axes
    steps = numbers["steps"]
    for name, method in METHODS.items():
        sigmoid, tanh = numbers[name]["sigmoid"], numbers[name]["tanh"]
        plots.band(accuracy, steps, 100 * sigmoid["accuracy"], method)
        low, median, high = sigmoid["inputs"].mean(0).T
        inputs.plot(steps, median, color=method.color)
        plots.shade(inputs, steps, low, high, color=method.color)
        for factor, share, style in zip(
            _FACTORS, 100 * tanh["saturated"], ("--", "-")
        ):
            label = f"{method.label}, weights ×{factor:g}"
            line = method._replace(label=label, style=style)
            plots.band(saturated, steps, share.mean(-1), line)
            layers = np.arange(1, share.shape[-1] + 1)
            plots.band(by_layer, layers, share[:, -1], line)
    accuracy.set_ylim(0, 103)
    saturated.set_ylim(0, 90)
    by_layer.set_ylim(0, 90)
    accuracy.legend()
    saturated.legend(loc="center right", bbox_to_anchor=(1, 0.36))
    limit = -KINDS["sigmoid"].limit
    plots.level(inputs, limit)
    text = {"ha": "right", "va": "bottom", "fontsize": 8}
    inputs.text(steps[-1], limit + 0.06, "saturated below", **text)


PANELS = (
    "Five sigmoid layers | step | training accuracy (%)",
    "Input of the last sigmoids (15%, 50%, 85%) | step | input",
    "Eight tanh layers | step | saturated units (%)",
    "The same after training | layer | saturated units (%)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), height=5.2
)
