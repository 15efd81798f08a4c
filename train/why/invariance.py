"""Under batch norm the length of a kernel is a learning rate, not a function.

In float64, but for the long runs, so that what is exact shows as exact.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxbn.diagnostics import angular_update, equilibrium_angle
from train.why import data, finding, nets
from train.why.finding import Finding, Settings

CLAIM = (
    "The loss does not depend on the length of a kernel before batch norm, and "
    "its gradient goes with 1/length (Ioffe and Szegedy 2015, 3.3). So weight "
    "decay is an exponentially growing learning rate (Li and Arora 2019), and "
    "each step comes to turn kernels by the same angle, whatever the loss (Wan "
    "et al. 2021)."
)
PUBLISHED = (
    "the loss at a W is that at W, its gradient 1/a of that at W, exactly; "
    "SGD with decay wd has the losses of SGD with rate "
    "lr (1 - lr wd)^(-2t - 1); the angle tends to sqrt(2 lr wd) after about "
    "1/(lr wd) steps."
)

SIZES = (64, 64)  # hidden layers
BATCH = 64
FACTORS = np.logspace(-2, 2, 17)
# Learning rate and weight decay of the runs towards equilibrium.
PAIRS = ((0.1, 0.05), (0.3, 0.02), (0.3, 0.05))
DECAY_RATE, DECAY = 0.1, 0.05
# Whether there is batch norm, and its epsilon.
NETS = {"with": (True, 0.0), "epsilon": (True, 1e-5), "without": (False, 0.0)}


class _Scaled(NamedTuple):
    """At each factor; (seeds, factors)."""

    loss: Any
    gradient: Any  # norm


def run(settings: Settings) -> Finding:
    found = data.load(settings)
    with jax.enable_x64(True):
        numbers = {
            "factors": FACTORS,
            "scaled": {
                name: _scaled(settings, found, *net)._asdict()
                for name, net in NETS.items()
            },
            "decay": {
                name: _decayed(settings, found, *net)
                for name, net in NETS.items()
            },
        }
    numbers["pairs"] = PAIRS[2:] if settings.quick else PAIRS
    numbers["angles"] = {
        name: _angles(settings, found, numbers["pairs"], NETS[name][0])
        for name in ("with", "without")
    }
    numbers |= _summary(numbers)
    return Finding(
        "invariance",
        "The length of a kernel under batch norm",
        CLAIM,
        PUBLISHED,
        _words(numbers),
        numbers,
        functools.partial(_draw, numbers),
    )


def split(params: nets.Params) -> tuple[nets.Params, nets.Params]:
    """Parts parameters into the hidden kernels and the rest."""
    kernels = {
        name: {"kernel": layer["kernel"]}
        for name, layer in params.items()
        if name != "head"
    }
    rest = {
        name: {
            key: value
            for key, value in layer.items()
            if name == "head" or key != "kernel"
        }
        for name, layer in params.items()
    }
    return kernels, rest


def loss_of_kernels(rest: nets.Params, **options: Any) -> nets.Loss:
    """The loss as a function of the hidden kernels alone."""
    whole = nets.loss_of(**options)

    def loss(kernels, batch_stats, batch):
        params = {name: rest[name] | kernels.get(name, {}) for name in rest}
        return whole(params, batch_stats, batch)

    return loss


def _start(found: data.Data, key: jax.Array, norm: bool) -> tuple:
    sizes = (found.train_x.shape[1], *SIZES, found.num_classes)
    return split(nets.init(key, sizes, norm=norm, dtype=float))


def _given(settings: Settings, found: data.Data, steps: int) -> tuple:
    """A key and an order of examples a seed, and the data."""
    keys = jnp.stack([jax.random.key(seed) for seed in settings.seeds])
    places = np.stack(
        [
            data.places(
                len(found.train_y), batch_size=BATCH, steps=steps, seed=seed
            )
            for seed in settings.seeds
        ]
    )
    x = jnp.asarray(found.train_x, float)
    return keys, places, (x, jnp.asarray(found.train_y))


def _scaled(
    settings: Settings, found: data.Data, norm: bool, epsilon: float
) -> _Scaled:
    """Scales the first kernel of a new net by each of FACTORS."""

    def one(key, places, examples, factor):
        kernels, rest = _start(found, key, norm)
        loss = loss_of_kernels(rest, norm=norm, epsilon=epsilon)
        kernels["layer0"]["kernel"] *= factor
        batch = jax.tree.map(lambda a: a[places[0]], examples)
        value, gradient = jax.value_and_grad(loss, has_aux=True)(
            kernels, (), batch
        )
        return value[0], jnp.linalg.norm(gradient["layer0"]["kernel"])

    every = jax.vmap(one, (None, None, None, 0))
    every = jax.jit(jax.vmap(every, (0, 0, None, None)))
    given = _given(settings, found, 1)
    return _Scaled(*map(np.asarray, every(*given, FACTORS)))


def _decayed(
    settings: Settings, found: data.Data, norm: bool, epsilon: float
) -> np.ndarray:
    """Losses with weight decay, and with the rate that replaces it.

    (seeds, 2, steps).
    """
    steps = 100 if settings.quick else 400
    t = np.arange(steps)
    growing = DECAY_RATE * (1 - DECAY_RATE * DECAY) ** (-2.0 * t - 1)
    rates = np.stack([np.full(steps, DECAY_RATE), growing])
    decays = np.array([DECAY, 0.0])

    def one(key, places, examples, rate, decay):
        kernels, rest = _start(found, key, norm)
        loss = loss_of_kernels(rest, norm=norm, epsilon=epsilon)
        return nets.sgd(
            loss, kernels, examples, places, rate, weight_decay=decay
        )[1]

    every = jax.vmap(one, (None, None, None, 0, 0))
    every = jax.jit(jax.vmap(every, (0, 0, None, None, None)))
    return np.asarray(every(*_given(settings, found, steps), rates, decays))


def _horizon(rate: float, decay: float) -> int:
    """Steps after which equilibrium has long been reached."""
    return round(8 / (rate * decay))


def _angles(
    settings: Settings,
    found: data.Data,
    pairs: tuple,
    norm: bool,
) -> np.ndarray:
    """Angle of each step, over channels: (pairs, seeds, steps, layers).

    Root mean square, in radians.
    """
    steps = max(_horizon(*pair) for pair in pairs)

    def watch(old, new):
        return jnp.stack(
            [
                jnp.sqrt(
                    jnp.square(
                        angular_update(old, new, path=(name, "kernel"))
                    ).mean()
                )
                for name in old
            ]
        )

    def one(key, places, examples, pair):
        kernels, rest = _start(found, key, norm)
        return nets.sgd(
            loss_of_kernels(rest, norm=norm),
            kernels,
            examples,
            places,
            pair[0],
            weight_decay=pair[1],
            watch=watch,
        )[2]

    every = jax.vmap(one, (0, 0, None, None))
    every = jax.jit(jax.vmap(every, (None, None, None, 0)))
    given = _given(settings, found, steps)
    return np.asarray(every(*given, np.array(pairs, np.float32)))


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the caption tells, a number a seed."""
    unit = np.searchsorted(FACTORS, 1 - 1e-9)
    told = {}
    for name, scaled in numbers["scaled"].items():
        loss, gradient = scaled["loss"], scaled["gradient"]
        change = np.abs(loss - loss[:, [unit]]).max(1)
        expected = gradient[:, [unit]] / FACTORS
        told[f"loss_change_{name}"] = change
        told[f"gradient_error_{name}"] = np.abs(gradient / expected - 1).max(1)
    for name, losses in numbers["decay"].items():
        apart = np.abs(losses[:, 0] - losses[:, 1])
        told[f"decay_difference_{name}"] = np.nanmax(apart, 1)
    for name, angles in numbers["angles"].items():
        ratios = []
        for pair, angle in zip(numbers["pairs"], angles):
            steps = _horizon(*pair)
            late = angle[:, steps * 3 // 4 : steps]
            ratios.append(
                np.sqrt(np.square(late).mean(1)) / equilibrium_angle(*pair)
            )
        # (seeds, pairs * layers)
        told[f"angle_over_theory_{name}"] = np.concatenate(ratios, 1)
    return told


def _words(numbers: dict[str, Any]) -> str:
    ratio = numbers["angle_over_theory_with"]
    holds = (
        (numbers["loss_change_with"] < 1e-12)
        & (numbers["gradient_error_with"] < 1e-12)
        & (numbers["decay_difference_with"] < 1e-12)
        & (np.abs(ratio - 1) < 0.1).all(1)
    )

    def worst(key: str) -> str:
        return finding.number(np.max(numbers[key]))

    return (
        "with the first kernel scaled by 0.01 to 100 the loss moves by at most "
        f"{worst('loss_change_with')} (epsilon 1e-5: "
        f"{worst('loss_change_epsilon')}; without batch norm: "
        f"{worst('loss_change_without')}). Weight decay and the growing rate "
        "differ in loss by at most "
        f"{worst('decay_difference_with')} (epsilon 1e-5: "
        f"{worst('decay_difference_epsilon')}; without: "
        f"{worst('decay_difference_without')}). Angles settle at "
        f"{finding.span(ratio, '.2f')} of sqrt(2 lr wd), without batch norm at "
        f"{finding.span(numbers['angle_over_theory_without'], '.2f')}. "
        + finding.verdict(holds)
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(9, 6.6)
    (loss, gradient), (decay, angle) = figure.subplots(2, 2)
    styles = {
        "with": (finding.WITH, "-", "with batch norm, epsilon 0"),
        "epsilon": (finding.WITH, ":", "with batch norm, epsilon 1e-5"),
        "without": (finding.WITHOUT, "-", finding.WITHOUT_LABEL),
    }
    factors = numbers["factors"]
    for name, (color, line, label) in styles.items():
        scaled = numbers["scaled"][name]
        for seed, (value, norm) in enumerate(
            zip(scaled["loss"], scaled["gradient"])
        ):
            kept = {"color": color, "ls": line, "alpha": 0.8}
            shown = label if seed == 0 else None
            loss.loglog(factors, value, label=shown, **kept)
            gradient.loglog(factors, norm, label=shown, **kept)
    middle = numbers["scaled"]["with"]["gradient"][0]
    unit = middle[len(middle) // 2]
    gradient.loglog(
        factors, unit / factors, "--", color=finding.THEORY, label="1/a"
    )
    loss.set(xlabel="factor a on the first kernel", ylabel="loss (nats)")
    gradient.set(
        xlabel="factor a on the first kernel",
        ylabel="norm of the kernel's gradient",
    )
    loss.set_title("Loss of a new net, its first kernel scaled")
    gradient.set_title("Gradient of that kernel")
    loss.legend()
    gradient.legend()
    _draw_decay(numbers, styles, decay)
    _draw_angles(numbers, angle)


def _draw_decay(numbers: dict[str, Any], styles: dict, axes: Any) -> None:
    for name, (color, line, _) in styles.items():
        losses = numbers["decay"][name]
        apart = np.abs(losses[:, 0] - losses[:, 1])
        # What is equal to the last bit has no place on a logarithmic axis.
        axes.semilogy(
            np.maximum(apart, 1e-17).T, color=color, ls=line, lw=1, alpha=0.7
        )
    axes.set(xlabel="step", ylabel="|difference of losses| (nats)")
    axes.set_title("Weight decay or a growing learning rate")


def _draw_angles(numbers: dict[str, Any], axes: Any) -> None:
    axes.axhline(1, ls="--", color=finding.THEORY, label="sqrt(2 lr wd)")
    lines = ("-", "--", ":")
    for name, color in (("with", finding.WITH), ("without", finding.WITHOUT)):
        for pair, line, angles in zip(
            numbers["pairs"], lines, numbers["angles"][name]
        ):
            steps = _horizon(*pair)
            # Root mean square over seeds, layers and a sixtieth of the run.
            width = max(steps // 60, 1)
            square = np.square(angles[:, : steps // width * width])
            square = square.mean((0, 2)).reshape(-1, width).mean(1)
            time = (np.arange(len(square)) + 0.5) * width * np.prod(pair)
            ratio = np.sqrt(square) / equilibrium_angle(*pair)
            label = f"lr {pair[0]}, wd {pair[1]}" if name == "with" else None
            axes.plot(time, ratio, line, color=color, lw=1.5, label=label)
    axes.set(xlabel="steps x lr x wd", ylabel="angle / sqrt(2 lr wd)")
    axes.set_ylim(0)
    axes.set_title("Angle by which a step turns the kernels")
    axes.legend(loc="center right")
