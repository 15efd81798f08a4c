"""Companions as noise, and who counts as one.

Claim: With batch norm, what a net says of an example depends on its companions
in the batch: a regularizing noise whose variance falls as one over the number
of examples that are normalized together.

Published: The net "no longer produces deterministic values for a given training
example", which regularizes it (Ioffe and Szegedy 2015, section 3.4). The mean
of n values has variance sigma^2 / n, and n of a pool of P drawn without
replacement (1 - n/P) of that.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax

from jaxbn import batch_norm, diagnostics
from train.why import nets, plots
from train.why.arms import ARMS, FOURTH, THEORY, WITH, WITHOUT, Arm
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.nets import Norm, Sizes
from train.why.words import number, say

DEVICES = 8
EACH = 16  # examples on a device
STRAIGHT = (16, 128)  # batch sizes between which n V is compared
BAND = 0.15  # that n V may depart there from its mean
SYNCHRONIZED = {"norm": functools.partial(batch_norm, axis_name="devices")}
ON_DEVICES = {
    "per device": Arm("8 devices of 16, per device", FOURTH, "s", WITH.options),
    "synchronized": Arm(
        "8 devices of 16, synchronized", THEORY, "D", SYNCHRONIZED
    ),
}
# Examples that are normalized together.
COUNTED = {"per device": EACH, "synchronized": DEVICES * EACH}
_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains, then normalizes test images with companions drawn at random."""
    sizes = _SIZES[2:7] if settings.quick else _SIZES
    steps = 100 if settings.quick else 300
    setting = data.setting(settings.seeds, steps=steps, batch_size=128)
    trained = each(ARMS, _train, setting, sizes=data.sizes(64, 64))
    pool, probes = (
        x[:: max(1, len(x) // count)]
        for (x, _), count in zip(data[:2], (1400, 32))
    )
    draws = 24 if settings.quick else 96

    def found(keys, net, **options):
        given = (keys, net), probes[:32], pool
        return jax.device_get(_noise(*given, draws=draws, **options))

    keys = setting.key
    curve = [found(keys, trained["with"], batch_size=n) for n in sizes]
    whole = {"batch_size": DEVICES * EACH}
    # Companions of their own: with those of the curve they would agree anyhow.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, DEVICES * EACH)
    numbers = {
        "batch_sizes": sizes,
        "pool": len(pool),
        "devices": DEVICES,
        "examples_per_device": EACH,
        **{k: np.stack([row[k] for row in curve], 1) for k in curve[0]},
        **each(
            ON_DEVICES, found, keys, trained["with"], devices=DEVICES, **whole
        ),
        "without": found(keys, trained["without"], norm=None, **whole),
    }
    return numbers | {"summary": _summary(numbers)}


@per_seed
def _train(setting: Setting, *, norm: Norm, sizes: Sizes) -> Any:
    """Returns parameters and population statistics."""
    params = nets.init(setting.key, sizes, norm=norm)
    loss = nets.loss_on(setting.train, norm=norm)
    params, _, _ = nets.train(loss, params, setting.indices, optax.sgd(0.1))
    return params, nets.apply(params, setting.train[0], norm=norm).moments


@per_seed
def _noise(
    run: Any,
    probes: jax.Array,
    pool: jax.Array,
    *,
    batch_size: int,
    draws: int,
    norm: Norm = batch_norm,
    devices: int = 1,
) -> dict[str, jax.Array]:
    """Variance, mean over probes, and flips of a batch that lies on devices."""

    def apply(params, statistics, x, *, train):
        known = None if train else statistics
        options = {"norm": norm, "statistics": known}
        parts = x.reshape(devices if train else 1, -1, x.shape[-1])
        logits = jax.vmap(
            lambda part: nets.apply(params, part, **options).logits,
            axis_name="devices",
        )(parts)
        return logits.reshape(len(x), -1)

    key, trained = run
    options = {"batch_size": batch_size, "draws": draws, "key": key}
    found = diagnostics.companion_noise(
        apply, *trained, probes, pool, **options
    )
    return {"variance": found.variance.mean(), "flips": found.flips}


def _inside(sizes: np.ndarray) -> np.ndarray:
    return (sizes >= STRAIGHT[0]) & (sizes <= STRAIGHT[1])


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """How straight the line is, and where devices lie on it, (S,) each."""
    sizes, variance = np.asarray(numbers["batch_sizes"]), numbers["variance"]
    product = sizes * variance
    typical = product[:, _inside(sizes)].mean(1)
    off = np.abs(product[:, _inside(sizes)] / typical[:, None] - 1).max(1)
    return {
        "product_off_by": off,
        "smallest_over_typical": product[:, 0] / typical,
        "device_over_batch": {
            arm: numbers[arm]["variance"] / variance[:, list(sizes).index(n)]
            for arm, n in COUNTED.items()
        },
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
            value = unit * numbers[name][key].mean()
            options = {"ms": 11, "mfc": "none", "mew": 2, "alpha": 1}
            plots.lines(place, [COUNTED[name]], [[value]], arm, **options)
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
PANELS = (
    f"Variance of the logits over companions | {_N} | "
    "variance V (logits squared)",
    f"Predictions that companions change | {_N} | share of predictions (%)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(1, 2), size=(10, 4.2)
)
