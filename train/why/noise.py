"""The noise that the other examples of a batch add to one's logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jaxbn import diagnostics
from train.why import nets, plots
from train.why.arms import ARMS, FOURTH, THEORY, WITH, WITHOUT, Arm, each
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, number, say

DEVICES = 8
EACH = 16  # examples on a device
STRAIGHT = (16, 128)  # batch sizes between which n V is compared
BAND = 0.15  # that n V may depart there from its mean
ON_DEVICES = {
    "per device": Arm(f"{DEVICES} devices of {EACH}, per device", FOURTH, "s"),
    "synchronized": Arm(
        f"{DEVICES} devices of {EACH}, synchronized",
        THEORY,
        "D",
        {"axis_name": "devices"},
    ),
}

_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
_RATE = 0.1
_BATCH = 128
_PROBES = 32


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains, then normalizes test images with companions drawn at random."""
    sizes = _SIZES[2:7] if settings.quick else _SIZES
    draws = 24 if settings.quick else 96
    steps = 100 if settings.quick else 300
    setting = data.setting(settings.seeds, steps=steps, batch_size=_BATCH)
    trained = each(ARMS, _train, setting, sizes=data.sizes(64, 64))
    keys = setting.keys
    pool = data.train_x[:: max(1, len(data.train_x) // 1400)]
    probes = data.test_x[:: len(data.test_x) // _PROBES][:_PROBES]
    found = functools.partial(_noise, pool=pool, probes=probes, draws=draws)
    curve = [found(keys, trained["with"], batch_size=n) for n in sizes]
    whole = DEVICES * EACH
    # Companions of their own: with those of the curve they would agree anyhow.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, whole)
    found = functools.partial(found, keys, batch_size=whole)
    numbers = {
        "batch_sizes": sizes,
        "pool": len(pool),
        "devices": DEVICES,
        "examples_per_device": EACH,
        **{k: np.stack([row[k] for row in curve], 1) for k in curve[0]},
        **each(ON_DEVICES, found, trained["with"], devices=DEVICES),
        "without": jax.device_get(found(trained["without"], norm=False)),
    }
    return numbers | {"summary": _summary(numbers)}


@functools.partial(jax.jit, static_argnames=("norm", "sizes"))
def _train(
    setting: Setting, *, norm: bool, sizes: tuple[int, ...]
) -> tuple[nets.Params, Any]:
    """Returns parameters and population statistics, one a seed."""

    def one(key, indices):
        params = nets.init(key, sizes, norm=norm)
        loss = nets.loss_of(norm=norm)
        params, _, _ = nets.sgd(loss, params, setting.train, indices, _RATE)
        return params, nets.population(params, setting.train[0], norm=norm)

    return jax.vmap(one)(setting.keys, setting.indices)


@functools.partial(
    jax.jit,
    static_argnames=("batch_size", "draws", "norm", "devices", "axis_name"),
)
def _noise(
    keys: jax.Array,
    trained: tuple[nets.Params, Any],
    *,
    pool: jax.Array,
    probes: jax.Array,
    draws: int,
    batch_size: int,
    norm: bool = True,
    devices: int | None = None,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Returns variance, mean over probes, and flips: (seeds,) each.

    Of a batch on one device or, where axis_name is "devices", synchronized
    over several.
    """

    def apply(params, statistics, x, *, train):
        if not train or devices is None:
            known = None if train else statistics
            return nets.apply(params, x, norm=norm, statistics=known).logits
        logits = jax.vmap(
            lambda part: nets.apply(params, part, axis_name=axis_name).logits,
            axis_name="devices",
        )(x.reshape(devices, -1, x.shape[-1]))
        return logits.reshape(len(x), -1)

    def one(key, trained):
        noise = diagnostics.companion_noise(
            apply,
            *trained,
            probes,
            pool,
            batch_size=batch_size,
            draws=draws,
            key=key,
        )
        return {"variance": noise.variance.mean(), "flips": noise.flips}

    return jax.vmap(one)(keys, trained)


def _inside(sizes: np.ndarray) -> np.ndarray:
    return (sizes >= STRAIGHT[0]) & (sizes <= STRAIGHT[1])


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """How straight the line is, and where devices lie on it, (S,) each."""
    sizes = np.asarray(numbers["batch_sizes"])
    product = sizes * numbers["variance"]
    inside = _inside(sizes)
    typical = product[:, inside].mean(1)
    off = np.abs(product[:, inside] / typical[:, None] - 1).max(1)
    ratio = {}
    for arm, n in (("per device", EACH), ("synchronized", DEVICES * EACH)):
        on_line = numbers["variance"][:, list(sizes).index(n)]
        ratio[arm] = numbers[arm]["variance"] / on_line
    return {
        "product_off_by": off,
        "smallest_over_typical": product[:, 0] / typical,
        "device_over_batch": ratio,
        "holds": off < BAND,
    }


def verdict(numbers: dict[str, Any]) -> str:
    return say(
        f"from n = {STRAIGHT[0]} to {STRAIGHT[1]}, n V departs from its mean "
        "by at most {product_off_by:percent}%, less than "
        f"{BAND:.0%}: {{holds:tally}}; at n = "
        f"{numbers['batch_sizes'][0]} it is only "
        "{smallest_over_typical:percent}% of that. "
        f"{DEVICES} devices of {EACH} that normalize alone have "
        "{device_over_batch[per device]:.2f} times the variance of a batch of "
        f"{EACH}; synchronized, {{device_over_batch[synchronized]:.2f}} times "
        f"that of a batch of {DEVICES * EACH}. Without batch norm it is "
        "{without[variance]:max}.",
        **numbers["summary"],
        without=numbers["without"],
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    sizes = np.asarray(numbers["batch_sizes"], float)
    mean = WITH._replace(label="with batch norm, batch of n", style="o-")
    for place, key, unit in zip(axes, ("variance", "flips"), (1, 100)):
        values = unit * numbers[key]
        plots.lines(place, sizes, values, WITH._replace(label=None), lw=1)
        plots.lines(place, sizes, values.mean(0)[None], mean, ms=4, alpha=1)
        for name, arm in ON_DEVICES.items():
            n = EACH if name == "per device" else DEVICES * EACH
            value = unit * numbers[name][key].mean()
            options = {"ms": 11, "mfc": "none", "mew": 2, "alpha": 1}
            plots.lines(place, [n], [[value]], arm, **options)
        place.set_xscale("log", base=2)
        place.set_xticks(sizes, [f"{n:.0f}" for n in sizes])
    axes[0].semilogy()
    # c / n, and with it the end of a finite pool, through the middle.
    law = (1 - sizes / numbers["pool"]) / sizes
    ratio = numbers["variance"].mean(0) / law
    law *= np.exp(np.log(ratio[_inside(sizes)]).mean())
    plots.theory(axes[0], sizes, law, "c (1/n - 1/P), pool of P")
    text = f"without batch norm: {number(numbers['without']['variance'].max())}"
    place = {"ha": "right", "va": "top", "transform": axes[0].transAxes}
    axes[0].text(0.97, 0.94, text, color=WITHOUT.color, **place)


_N = "n, examples normalized together"
EXPERIMENT = Experiment(
    "noise",
    "Companions as noise, and who counts as one",
    claim=(
        "With batch norm, what a net says of an example depends on its "
        "companions in the batch: a regularizing noise whose variance falls "
        "as one over the number of examples that are normalized together."
    ),
    published=(
        'The net "no longer produces deterministic values for a given training '
        'example", which regularizes it (Ioffe and Szegedy 2015, section 3.4). '
        "The mean of n values has variance sigma^2 / n, and n of a pool of P "
        "drawn without replacement (1 - n/P) of that."
    ),
    measure=measure,
    verdict=verdict,
    draw=draw,
    panels=(
        f"Variance of the logits over companions | {_N} | "
        "variance V (logits squared)",
        f"Predictions that companions change | {_N} | share of predictions (%)",
    ),
    shape=(1, 2),
    size=(10, 4.2),
)
