"""Where sigmoids and tanhs are flat.

Claim: Without batch norm the inputs of sigmoids and tanhs drift to where these
are flat, and gradients vanish; batch norm keeps them where they bend.

Published: Inception with sigmoids is never above chance (0.1%) without batch
norm and reaches 69.8% with it; percentiles of a sigmoid's input stay put with
it and wander without (Ioffe and Szegedy 2015, section 4.2.2 and figure 1). The
last hidden layer of a sigmoid net is soon driven towards 0, and with five
layers never comes back (Glorot and Bengio 2010, section 3.1).
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
from train.why.arms import ARMS
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.nets import Norm
from train.why.words import say

FLAT = 0.1  # a unit is saturated where its slope is below that of its largest
# |input| with that slope: tanh' = 1 / cosh(h)^2, and a sigmoid is a tanh of
# half its input.
_BEND = math.acosh(FLAT**-0.5)


class Kind(NamedTuple):
    """A net by its activation."""

    activation: Any
    limit: float
    depth: int
    rate: float


KINDS = {
    "sigmoid": Kind(jax.nn.sigmoid, 2 * _BEND, 5, 1.0),
    "tanh": Kind(jnp.tanh, _BEND, 8, 0.1),
}
_FACTORS = (1.0, 3.0)  # times the usual weights at the start, for tanh
_EVERY = 25  # steps between two probes
_EXAMPLES = 512  # training images of a probe
_PERCENTILES = (15, 50, 85)


class Probes(NamedTuple):
    """Along one run, every 25 steps."""

    accuracy: jax.Array  # (P,) on training images, with their statistics
    saturated: jax.Array  # (P, L) share of the units of a layer
    inputs: jax.Array  # (P, 3) percentiles of what the last layer's units see
    slope: jax.Array  # (P,) mean slope of these, 1 is the largest


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains a sigmoid net, and tanh nets from usual and large weights."""
    steps = 300 if settings.quick else 1000
    setting = data.setting(settings.seeds, steps=steps, batch_size=64)
    runs = [
        each(ARMS, train, setting, factor, kind=kind, ends=data.sizes())
        for kind, factor in (("sigmoid", 1.0), *(("tanh", f) for f in _FACTORS))
    ]
    numbers: dict[str, Any] = {
        "steps": np.arange(0, steps, _EVERY),
        "percentiles": _PERCENTILES,
        "factors": _FACTORS,
        "limits": {name: kind.limit for name, kind in KINDS.items()},
        "chance": 1 / data.num_classes,
    }
    for arm in ARMS:
        sigmoid, *tanh = (run[arm] for run in runs)
        both = jax.tree.map(lambda *a: np.stack(a), *tanh)
        numbers[arm] = {"sigmoid": sigmoid._asdict(), "tanh": both._asdict()}
    return numbers | {"summary": _summary(numbers)}


@per_seed
def train(
    setting: Setting, factor: Any, *, norm: Norm, kind: str, ends: tuple
) -> Probes:
    """Trains from weights of factor times the usual size."""
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
    """After training, (S,) each; of tanh nets (factors, S)."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        sigmoid, tanh = numbers[arm]["sigmoid"], numbers[arm]["tanh"]
        found[arm] = {
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


def verdict(numbers: dict[str, Any]) -> str:
    found = numbers["summary"]
    tanh = "; ".join(
        f"weights x{factor:.0f}: "
        f"{{a[tanh_saturated][{i}]:percent}}% without, "
        f"{{b[tanh_saturated][{i}]:percent}}% with, fewer: "
        f"{{holds[tanh][{factor}]:tally}}; accuracy "
        f"{{a[tanh_accuracy][{i}]:percent}}% and "
        f"{{b[tanh_accuracy][{i}]:percent}}%"
        for i, factor in enumerate(_FACTORS)
    )
    return say(
        "after training, five sigmoid layers: accuracy (%) "
        "{a[accuracy]:percent} without, {b[accuracy]:percent} with, learns "
        "only with: {holds[sigmoid]:tally}; median input of the last layer "
        "{a[input]:.1f} without, {b[input]:.1f} with; mean slope there, of the "
        "largest, {a[slope]:.2f} without, {b[slope]:.2f} with. Eight tanh "
        f"layers, saturated units: {tanh}.",
        a=found["without"],
        b=found["with"],
        holds=found["holds"],
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    accuracy, inputs, saturated, by_layer = axes
    steps = numbers["steps"]
    for name, arm in ARMS.items():
        sigmoid, tanh = numbers[name]["sigmoid"], numbers[name]["tanh"]
        plots.band(accuracy, steps, 100 * sigmoid["accuracy"], arm)
        low, median, high = sigmoid["inputs"].mean(0).T
        inputs.plot(steps, median, color=arm.color, label=arm.label)
        plots.shade(inputs, steps, low, high, color=arm.color)
        for factor, share, style in zip(
            _FACTORS, 100 * tanh["saturated"], ("--", "-")
        ):
            label = f"{arm.label}, weights x{factor:.0f}"
            line = arm._replace(label=label, style=style)
            plots.band(saturated, steps, share.mean(-1), line)
            layers = np.arange(1, share.shape[-1] + 1)
            plots.band(by_layer, layers, share[:, -1], line)
    accuracy.set_ylim(0, 103)
    saturated.set_ylim(0, 75)
    by_layer.set_ylim(0, 75)
    limit = -KINDS["sigmoid"].limit
    plots.level(inputs, limit)
    text = f"saturated below: slope {FLAT:.0%} of the largest"
    place = {"ha": "right", "va": "bottom", "fontsize": 8}
    inputs.text(steps[-1], limit + 0.06, text, **place)


PANELS = (
    "Five sigmoid layers: training | step | training accuracy (%)",
    "Input of the last sigmoids: median, 15% to 85% | step | input",
    "Eight tanh layers: saturated units | step | share, all layers (%)",
    "The same after training, layer by layer | layer | share (%)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), size=(10.5, 6.2)
)
