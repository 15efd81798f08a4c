"""The noise that the other examples of a batch add to one's logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxbn import diagnostics
from train.why import data, draw, finding, nets
from train.why.finding import Finding, Settings

CLAIM = (
    "With batch norm, what a net says of an example depends on its companions "
    "in the batch: a regularizing noise whose variance falls as one over the "
    "number of examples that are normalized together."
)

DEVICES = 8
EACH = 16  # examples on a device
STRAIGHT = (16, 128)  # batch sizes between which n V is compared
BAND = 0.15  # that n V may depart there from its mean

_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
_RATE = 0.1
_BATCH = 128
_PROBES = 32


def run(settings: Settings) -> Finding:
    """Trains, then normalizes test images with companions drawn at random."""
    found = data.load(settings)
    steps = 100 if settings.quick else 300
    draws = 24 if settings.quick else 96
    sizes = _SIZES[2:7] if settings.quick else _SIZES
    train = (found.train_x, found.train_y)
    widths = (found.train_x.shape[1], 64, 64, found.num_classes)
    pool = found.train_x[:: max(1, len(found.train_x) // 1400)]
    probes = found.test_x[:: len(found.test_x) // _PROBES][:_PROBES]
    keys = jax.vmap(jax.random.key)(np.asarray(settings.seeds))
    places = data.places_by_seed(
        len(found.train_y), batch_size=_BATCH, steps=steps, seeds=settings.seeds
    )
    nets_ = {
        norm: _train(keys, train, places, norm=norm, widths=widths)
        for norm in (False, True)
    }
    measure = functools.partial(_measure, pool=pool, probes=probes, draws=draws)
    curve = [measure(keys, nets_[True], batch_size=n) for n in sizes]
    whole = DEVICES * EACH
    # Companions of their own: with those of the curve they would agree anyhow.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, whole)
    measure = functools.partial(measure, keys, batch_size=whole)
    ways = {
        "synchronized": measure(nets_[True], way="sync"),
        "per device": measure(nets_[True], way="device"),
        "without": measure(nets_[False], way="none"),
    }
    numbers = {
        "batch_sizes": sizes,
        "pool": len(pool),
        "variance": np.stack([v for v, _ in curve], 1),
        "flips": np.stack([f for _, f in curve], 1),
        "devices": DEVICES,
        "examples_per_device": EACH,
        **{
            way: {"variance": variance, "flips": flips}
            for way, (variance, flips) in ways.items()
        },
    }
    numbers["summary"] = _summary(numbers)
    return Finding(
        name="noise",
        title="Companions as noise, and who counts as one",
        claim=CLAIM,
        published=(
            'The net "no longer produces deterministic values for a given '
            'training example", which regularizes it (Ioffe and Szegedy '
            "2015, section 3.4). The mean of n values has variance "
            "sigma^2 / n, and n of a pool of P drawn without replacement "
            "(1 - n/P) of that."
        ),
        measured=_words(numbers),
        numbers=numbers,
        draw=functools.partial(_draw, numbers),
    )


@functools.partial(jax.jit, static_argnames=("norm", "widths"))
def _train(
    keys: jax.Array,
    train: tuple[jax.Array, jax.Array],
    places: jax.Array,
    *,
    norm: bool,
    widths: tuple[int, ...],
) -> tuple[nets.Params, Any]:
    """Returns parameters and population statistics, one a seed."""

    def one(key, places):
        params = nets.init(key, widths, norm=norm)
        loss = nets.loss_of(norm=norm)
        params, _, _ = nets.sgd(loss, params, train, places, _RATE)
        return params, nets.population(params, train[0], norm=norm)

    return jax.vmap(one)(keys, places)


def _on_devices(way: str) -> Callable[..., jax.Array]:
    """Returns apply(params, statistics, x, train=...) of a batch on devices.

    way: "alone", the whole batch at once; "none", without batch norm;
    "device" or "sync", on DEVICES devices that normalize alone or together.
    """

    def apply(params, statistics, x, *, train):
        norm = way != "none"
        if not train or way in ("alone", "none"):
            known = None if train else statistics
            return nets.apply(params, x, norm=norm, statistics=known).logits
        together = "devices" if way == "sync" else None
        logits = jax.vmap(
            lambda part: nets.apply(params, part, axis_name=together).logits,
            axis_name="devices",
        )(x.reshape(DEVICES, -1, x.shape[-1]))
        return logits.reshape(len(x), -1)

    return apply


@functools.partial(jax.jit, static_argnames=("way", "batch_size", "draws"))
def _measure(
    keys: jax.Array,
    trained: tuple[nets.Params, Any],
    *,
    pool: jax.Array,
    probes: jax.Array,
    draws: int,
    batch_size: int,
    way: str = "alone",
) -> tuple[jax.Array, jax.Array]:
    """Returns variance, mean over probes, and flips: (seeds,) each."""

    def one(key, trained):
        noise = diagnostics.companion_noise(
            _on_devices(way),
            *trained,
            probes,
            pool,
            batch_size=batch_size,
            draws=draws,
            key=key,
        )
        return noise.variance.mean(), noise.flips

    return jax.vmap(one)(keys, trained)


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """How straight the line is, and where devices lie on it, (S,) each."""
    sizes = np.asarray(numbers["batch_sizes"])
    product = sizes * numbers["variance"]
    inside = (sizes >= STRAIGHT[0]) & (sizes <= STRAIGHT[1])
    typical = product[:, inside].mean(1)
    off = np.abs(product[:, inside] / typical[:, None] - 1).max(1)
    ratio = {}
    for way, n in (("per device", EACH), ("synchronized", DEVICES * EACH)):
        on_line = numbers["variance"][:, list(sizes).index(n)]
        ratio[way] = numbers[way]["variance"] / on_line
    return {
        "product_off_by": off,
        "smallest_over_typical": product[:, 0] / typical,
        "device_over_batch": ratio,
        "holds": off < BAND,
    }


def _words(numbers: dict[str, Any]) -> str:
    told, span = numbers["summary"], finding.span
    ratio = told["device_over_batch"]
    return (
        f"from n = {STRAIGHT[0]} to {STRAIGHT[1]}, n V departs from its mean "
        f"by at most {span(100 * told['product_off_by'], '.0f')}%, less than "
        f"{BAND:.0%}: {draw.tally(told['holds'])}; at n = "
        f"{numbers['batch_sizes'][0]} it is only "
        f"{span(100 * told['smallest_over_typical'], '.0f')}% of that. "
        f"{DEVICES} devices of {EACH} that normalize alone have "
        f"{span(ratio['per device'], '.2f')} times the variance of a batch of "
        f"{EACH}; synchronized, {span(ratio['synchronized'], '.2f')} times "
        f"that of a batch of {DEVICES * EACH}. Without batch norm it is "
        f"{finding.number(numbers['without']['variance'].max())}."
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(10, 4.2)
    left, right = figure.subplots(1, 2)
    sizes = np.asarray(numbers["batch_sizes"], float)
    for axis, key, unit in ((left, "variance", 1), (right, "flips", 100)):
        values = unit * numbers[key]
        axis.plot(sizes, values.T, color=finding.WITH, linewidth=1, alpha=0.5)
        axis.plot(
            sizes,
            values.mean(0),
            "o-",
            color=finding.WITH,
            markersize=4,
            label="with batch norm, batch of n",
        )
        for way, n, color, marker in (
            ("per device", EACH, finding.FOURTH, "s"),
            ("synchronized", DEVICES * EACH, finding.THEORY, "D"),
        ):
            axis.plot(
                n,
                unit * numbers[way][key].mean(),
                marker,
                markersize=11,
                markerfacecolor="none",
                markeredgewidth=2,
                color=color,
                label=f"{DEVICES} devices of {EACH}, {way}",
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{n:.0f}" for n in sizes])
        axis.set_xlabel("n, examples normalized together")
    _law(left, sizes, numbers)
    left.set_yscale("log")
    left.set(
        title="Variance of the logits over companions",
        ylabel="variance V (logits squared)",
    )
    zero = numbers["without"]["variance"].max()
    left.text(
        0.97,
        0.94,
        f"without batch norm: {finding.number(zero)}",
        color=finding.WITHOUT,
        ha="right",
        va="top",
        transform=left.transAxes,
    )
    left.legend(loc="lower left")
    right.set(
        title="Predictions that companions change",
        ylabel="share of predictions (%)",
    )


def _law(axis: Any, sizes: np.ndarray, numbers: dict[str, Any]) -> None:
    """c / n, and with it the last of a finite pool, through the middle."""
    pool = numbers["pool"]
    law = (1 - sizes / pool) / sizes
    inside = (sizes >= STRAIGHT[0]) & (sizes <= STRAIGHT[1])
    mean = numbers["variance"].mean(0)
    c = np.exp(np.mean(np.log(mean[inside] / law[inside])))
    axis.plot(
        sizes,
        c * law,
        "--",
        color=finding.THEORY,
        linewidth=1.2,
        label="c (1/n - 1/P), pool of P",
    )
