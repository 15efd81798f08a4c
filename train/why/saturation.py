"""Units that are driven to where their activation is flat."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxbn import diagnostics
from train.why import data, draw, finding, nets
from train.why.finding import Finding, Settings

CLAIM = (
    "Without batch norm the inputs of sigmoids and tanhs drift to where these "
    "are flat, and gradients vanish; batch norm keeps them where they bend."
)

FLAT = 0.1  # a unit is saturated where its slope is below that of its largest

_RATE = {"sigmoid": 1.0, "tanh": 0.1}
_DEPTH = {"sigmoid": 5, "tanh": 8}
_ACTIVATION = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}
# |input| with that slope: tanh' = 1 / cosh(h)^2, and a sigmoid is a tanh of
# half its input.
_BEND = math.acosh(FLAT**-0.5)
_LIMIT = {"sigmoid": 2 * _BEND, "tanh": _BEND}
_FACTORS = (1.0, 3.0)  # times the usual weights at the start, for tanh
_BATCH = 64
_EVERY = 25  # steps between two looks
_LOOK = 512  # training images that a look takes
_PERCENTILES = (15, 50, 85)


class Looks(NamedTuple):
    """Along one run, every 25 steps."""

    accuracy: jax.Array  # (P,) on training images, with their statistics
    saturated: jax.Array  # (P, L) share of the units of a layer
    inputs: jax.Array  # (P, 3) percentiles of what the last layer's units see
    slope: jax.Array  # (P,) mean slope of these, 1 is the largest


def run(settings: Settings) -> Finding:
    """Trains a sigmoid net, and tanh nets from usual and large weights."""
    found = data.load(settings)
    steps = 300 if settings.quick else 1000
    train = (found.train_x, found.train_y)
    seeds = np.asarray(settings.seeds)
    places = data.places_by_seed(
        len(found.train_y), batch_size=_BATCH, steps=steps, seeds=settings.seeds
    )
    ends = (found.train_x.shape[1], found.num_classes)
    measure = functools.partial(_measure, seeds, train, places, ends=ends)
    numbers: dict[str, Any] = {
        "steps": np.arange(0, steps, _EVERY),
        "percentiles": _PERCENTILES,
        "factors": _FACTORS,
        "limits": _LIMIT,
        "chance": 1 / found.num_classes,
    }
    for name, norm in (("without", False), ("with", True)):
        sigmoid = measure(1.0, norm=norm, kind="sigmoid")
        tanh = [measure(f, norm=norm, kind="tanh") for f in _FACTORS]
        tanh = jax.tree.map(lambda *a: np.stack(a), *tanh)
        numbers[name] = {
            "sigmoid": jax.device_get(sigmoid)._asdict(),
            "tanh": tanh._asdict(),
        }
    numbers["summary"] = _summary(numbers)
    return Finding(
        name="saturation",
        title="Where sigmoids and tanhs are flat",
        claim=CLAIM,
        published=(
            "Inception with sigmoids is never above chance (0.1%) without "
            "batch norm and reaches 69.8% with it; percentiles of a sigmoid's "
            "input stay put with it and wander without (Ioffe and Szegedy "
            "2015, section 4.2.2 and figure 1). The last hidden layer of a "
            "sigmoid net is soon driven towards 0, and with five layers never "
            "comes back (Glorot and Bengio 2010, section 3.1)."
        ),
        measured=_words(numbers),
        numbers=numbers,
        draw=functools.partial(_draw, numbers),
    )


@functools.partial(jax.jit, static_argnames=("norm", "kind", "ends"))
def _measure(
    seeds: jax.Array,
    train: tuple[jax.Array, jax.Array],
    places: jax.Array,
    factor: jax.Array,
    *,
    norm: bool,
    kind: str,
    ends: tuple[int, int],
) -> Looks:
    activation = _ACTIVATION[kind]
    options = {"norm": norm, "activation": activation}
    loss = nets.loss_of(**options)
    sizes = (ends[0], *[64] * _DEPTH[kind], ends[1])
    shown = tuple(a[:: max(1, len(a) // _LOOK)][:_LOOK] for a in train)

    def one(seed, places):
        params = nets.init(
            jax.random.key(seed),
            sizes,
            norm=norm,
            gain="lecun",
            factor=factor,
        )

        def look(params, places):
            x, labels = shown
            logits, _, taps = nets.apply(params, x, **options)
            slopes = jax.vmap(jax.grad(activation))(taps[-1].reshape(-1))
            seen = Looks(
                (logits.argmax(-1) == labels).mean(),
                diagnostics.activation_stats(
                    taps, limit=_LIMIT[kind]
                ).saturated,
                jnp.percentile(taps[-1], jnp.asarray(_PERCENTILES)),
                slopes.mean() / jax.grad(activation)(0.0),
            )
            params, _, _ = nets.sgd(loss, params, train, places, _RATE[kind])
            return params, seen

        places = places.reshape(-1, _EVERY, places.shape[-1])
        return jax.lax.scan(look, params, places)[1]

    return jax.vmap(one)(seeds, places)


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """After training, (S,) each; of tanh nets (factors, S)."""
    told: dict[str, Any] = {}
    for side in finding.SIDES:
        sigmoid, tanh = numbers[side]["sigmoid"], numbers[side]["tanh"]
        told[side] = {
            "accuracy": sigmoid["accuracy"][:, -1],
            "input": sigmoid["inputs"][:, -1, 1],
            "slope": sigmoid["slope"][:, -1],
            "tanh_accuracy": tanh["accuracy"][..., -1],
            "tanh_saturated": tanh["saturated"][:, :, -1].mean(-1),
        }
    without, with_ = told["without"], told["with"]
    fewer = with_["tanh_saturated"] < without["tanh_saturated"]
    told["holds"] = {
        "sigmoid": (with_["accuracy"] > 0.9)
        & (without["accuracy"] < 2 * numbers["chance"]),
        "slope": with_["slope"] > without["slope"],
        "tanh": dict(zip(map(str, _FACTORS), fewer)),
    }
    return told


def _words(numbers: dict[str, Any]) -> str:
    span, told = finding.span, numbers["summary"]
    without, with_ = told["without"], told["with"]
    holds = told["holds"]

    def both(key: str, spec: str, times: float = 1) -> str:
        first, second = (
            span(times * side[key], spec) for side in (without, with_)
        )
        return f"{first} without, {second} with"

    tanh = "; ".join(
        f"weights x{factor:.0f}: "
        f"{span(100 * without['tanh_saturated'][i], '.0f')}% without, "
        f"{span(100 * with_['tanh_saturated'][i], '.0f')}% with, fewer: "
        f"{draw.tally(holds['tanh'][str(factor)])}; accuracy "
        f"{span(100 * without['tanh_accuracy'][i], '.0f')}% and "
        f"{span(100 * with_['tanh_accuracy'][i], '.0f')}%"
        for i, factor in enumerate(_FACTORS)
    )
    return (
        "after training, five sigmoid layers: accuracy (%) "
        f"{both('accuracy', '.0f', 100)}, learns only with: "
        f"{draw.tally(holds['sigmoid'])}; median input of the last layer "
        f"{both('input', '.1f')}; mean slope there, of the largest, "
        f"{both('slope', '.2f')}. Eight tanh layers, saturated units: {tanh}."
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(10.5, 6.2)
    axes = figure.subplots(2, 2)
    steps = numbers["steps"]
    for side, (color, label) in finding.SIDES.items():
        sigmoid, tanh = numbers[side]["sigmoid"], numbers[side]["tanh"]
        right = 100 * sigmoid["accuracy"]
        draw.band(axes[0, 0], steps, right, color=color, label=label)
        inputs = sigmoid["inputs"].mean(0)
        axes[0, 1].plot(steps, inputs[:, 1], color=color, label=label)
        axes[0, 1].fill_between(
            steps, inputs[:, 0], inputs[:, 2], color=color, alpha=0.2, lw=0
        )
        for factor, share, style in zip(
            _FACTORS, 100 * tanh["saturated"], ("--", "-")
        ):
            kept = {
                "color": color,
                "style": style,
                "label": f"{label}, weights x{factor:.0f}",
            }
            draw.band(axes[1, 0], steps, share.mean(-1), **kept)
            layers = np.arange(1, share.shape[-1] + 1)
            draw.band(axes[1, 1], layers, share[:, -1], **kept)
    axes[0, 0].set(
        title="Five sigmoid layers: training",
        ylabel="training accuracy (%)",
        ylim=(0, 103),
    )
    axes[0, 1].set(
        title="Input of the last sigmoids: median, 15% to 85%",
        ylabel="input",
    )
    axes[1, 0].set(
        title="Eight tanh layers: saturated units",
        ylabel="share, all layers (%)",
        ylim=(0, 75),
    )
    axes[1, 1].set(
        title="The same after training, layer by layer",
        ylabel="share (%)",
        ylim=(0, 75),
    )
    for axis in axes.flat:
        axis.set_xlabel("layer" if axis is axes[1, 1] else "step")
    _draw_limit(axes[0, 1], steps[-1])
    axes[0, 0].legend(loc="center right")
    axes[1, 0].legend(loc="center right")


def _draw_limit(axis: Any, right: float) -> None:
    limit = -_LIMIT["sigmoid"]
    axis.axhline(limit, color=finding.THEORY, linewidth=0.8, linestyle=":")
    axis.text(
        right,
        limit + 0.06,
        f"saturated below: slope {FLAT:.0%} of the largest",
        ha="right",
        va="bottom",
        fontsize=8,
    )
