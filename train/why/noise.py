"""Noise from the batch.

Claim: With batch norm, the output for an example depends on the other examples
of its batch. This noise regularizes; its variance is inversely proportional to
the number of examples that are normalized together.

Published: The network "no longer produces deterministic values for a given
training example", which regularizes it (Ioffe and Szegedy 2015, section 3.4).
The mean of n values has variance sigma^2 / n; if they are drawn without
replacement from a pool of P, it is (1 - n/P) times that.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax

from jaxbn import batch_norm, diagnostics
from train.why import nets, plots
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.methods import FOURTH, METHODS, THEORY, WITH, WITHOUT, Method
from train.why.nets import Norm, Sizes
from train.why.words import held, largest, percent, span

DEVICES = 8
EACH = 16  # examples per device
STRAIGHT = (16, 128)  # batch sizes between which n V is compared
BAND = 0.15  # by which n V may differ from its mean there
SYNCHRONIZED = {"norm": functools.partial(batch_norm, axis_name="devices")}
ON_DEVICES = {
    "per device": Method(
        "8 devices × 16, per device", FOURTH, "s", WITH.options
    ),
    "synchronized": Method(
        "8 devices × 16, synchronized", THEORY, "D", SYNCHRONIZED
    ),
}
# Examples that are normalized together.
COUNTED = {"per device": EACH, "synchronized": DEVICES * EACH}
_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains, then evaluates test images in random training batches."""
    sizes = _SIZES[2:7] if settings.quick else _SIZES
    steps = 100 if settings.quick else 300
    setting = data.setting(settings.seeds, steps=steps, batch_size=128)
    trained = each(METHODS, _train, setting, sizes=data.sizes(64, 64))
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
    # Other draws than those of the curve, which would agree in any case.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, DEVICES * EACH)
    numbers = {
        "batch_sizes": sizes,
        "pool": len(pool),
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
    """Variance, mean over probes, and flips, with a batch split over devices."""

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
    """How constant n V is, and how devices compare with it, (S,) each."""
    sizes, variance = np.asarray(numbers["batch_sizes"]), numbers["variance"]
    product = sizes * variance
    typical = product[:, _inside(sizes)].mean(1)
    off = np.abs(product[:, _inside(sizes)] / typical[:, None] - 1).max(1)
    return {
        "product_off_by": off,
        "smallest_over_typical": product[:, 0] / typical,
        "device_over_batch": {
            name: numbers[name]["variance"] / variance[:, list(sizes).index(n)]
            for name, n in COUNTED.items()
        },
        "holds": off < BAND,
    }


def verdict(numbers: dict[str, Any]) -> list[str]:
    found = numbers["summary"]
    ratio = found["device_over_batch"]
    return [
        f"From n = {STRAIGHT[0]} to {STRAIGHT[1]}, n times the variance differs "
        f"from its mean by at most {percent(found['product_off_by'])}. "
        + held(f"Constant within {BAND:.0%}", found["holds"])
        + f" For n = {numbers['batch_sizes'][0]} it is "
        f"{percent(found['smallest_over_typical'])} of that mean.",
        f"{DEVICES} devices that normalize {EACH} examples each have "
        f"{span(ratio['per device'], '.2f')} times the variance of one batch "
        f"of {EACH}; synchronized, {span(ratio['synchronized'], '.2f')} times "
        f"that of one batch of {DEVICES * EACH}.",
        "Without batch norm the variance is "
        f"{largest(numbers['without']['variance'])}.",
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    sizes = np.asarray(numbers["batch_sizes"], float)
    line = WITH._replace(style="o-")
    for place, key, unit in zip(axes, ("variance", "flips"), (1, 100)):
        plots.band(place, sizes, unit * numbers[key], line)
        for name, method in ON_DEVICES.items():
            value = unit * numbers[name][key].mean()
            options = {"ms": 10, "mfc": "none", "mew": 2, "alpha": 1}
            plots.lines(place, [COUNTED[name]], [[value]], method, **options)
        place.set_xscale("log", base=2)
        place.set_xticks(sizes, [f"{n:.0f}" for n in sizes])
    variance = axes[0]
    variance.set_yscale("log")
    # c (1/n - 1/P), as of n draws from a pool of P, through the middle.
    law = (1 - sizes / numbers["pool"]) / sizes
    ratio = numbers["variance"].mean(0) / law
    law *= np.exp(np.log(ratio[_inside(sizes)]).mean())
    plots.theory(variance, sizes, law)
    plots.note(variance, 0.17, 0.88, "theory: ∝ 1/n − 1/P")
    plots.name(variance, 0.04, 0.62, WITH)
    plots.name(variance, 0.43, 0.62, ON_DEVICES["per device"])
    plots.name(variance, 0.07, 0.3, ON_DEVICES["synchronized"])
    text = f"no batch norm: {largest(numbers['without']['variance'])}"
    plots.note(variance, 0.04, 0.05, text, WITHOUT.color)


_N = "examples normalized together, n"
PANELS = (
    f"Variance of the logits over random batches | {_N} | variance",
    f"Predictions that differ from inference | {_N} | predictions (%)",
)
EXPERIMENT = Experiment(measure, verdict, draw, PANELS, shape=(1, 2), height=3)
