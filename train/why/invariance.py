"""Scale invariance of the weights.

Claim: The loss does not depend on the scale of a kernel followed by batch norm,
and the gradient is inversely proportional to it (Ioffe and Szegedy 2015,
section 3.3). So weight decay is equivalent to an exponentially growing learning
rate (Li and Arora 2019), and in equilibrium every step rotates the kernels by
the same angle, for any loss (Wan et al. 2021).

Published: The loss at a W is that at W, and the gradient is divided by a. SGD
with weight decay wd has the losses of SGD with learning rate
lr (1 - lr wd)^(-2t - 1). The angle converges to sqrt(2 lr wd) after about
1 / (lr wd) steps.

Only the hidden kernels are trained; in float64, except for the long runs, so
that equal losses are equal to the last digits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import batch_norm
from jaxbn.diagnostics import angular_update, equilibrium_angle
from train.why import nets, plots
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.methods import THEORY, WITH, WITHOUT, Method
from train.why.nets import Norm, Sizes
from train.why.words import held, largest, span

FACTORS = np.logspace(-2, 2, 17)  # on the first kernel
UNIT = 8  # the factor 1
DECAY_RATE, DECAY = 0.1, 0.05  # learning rate and weight decay
# The same of the runs to equilibrium.
PAIRS = ((0.1, 0.05), (0.3, 0.02), (0.3, 0.05))
EXACT = {"norm": functools.partial(batch_norm, epsilon=0.0)}
METHODS = {
    "with": WITH._replace(label="batch norm, ε = 0", options=EXACT),
    "epsilon": WITH._replace(label="batch norm, ε = 1e-5", style=":"),
    "without": WITHOUT,
}


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    pairs = PAIRS[2:] if settings.quick else PAIRS
    make = functools.partial(data.setting, settings.seeds, batch_size=64)
    sizes = data.sizes(64, 64)
    with jax.enable_x64(True):
        short = make(steps=100 if settings.quick else 400)
        numbers = {
            "factors": FACTORS,
            "scaled": each(METHODS, scaled, short, sizes=sizes),
            "decay": each(METHODS, decayed, short, sizes=sizes),
        }
    long = make(steps=max(horizon(*pair) for pair in pairs))
    numbers["pairs"] = pairs
    numbers["angles"] = {}
    for name in ("with", "without"):
        norm = batch_norm if name == "with" else None
        turn = functools.partial(angles, long, sizes=sizes, norm=norm)
        turned = jax.vmap(turn)(np.array(pairs, np.float32))
        numbers["angles"][name] = np.asarray(turned)
    return numbers | _summary(numbers)


def _start(
    setting: Setting, sizes: Sizes, norm: Norm
) -> tuple[list[jax.Array], nets.Loss]:
    """Returns the hidden kernels, and the loss as a function of only them."""
    params = nets.init(setting.key, sizes, norm=norm)
    whole = nets.loss_on(setting.train, norm=norm)

    def loss(kernels, index):
        pairs = zip(params["hidden"], kernels)
        hidden = [layer | {"kernel": kernel} for layer, kernel in pairs]
        return whole(params | {"hidden": hidden}, index)

    return [layer["kernel"] for layer in params["hidden"]], loss


def _sgd(rate: Any, decay: jax.Array) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))


@per_seed
def scaled(setting: Setting, *, sizes: Sizes, norm: Norm) -> Any:
    """Initial loss, and gradient norm of the first kernel, times each factor.

    Returns:
      loss and gradient, (factors,) each.
    """
    (first, *rest), loss = _start(setting, sizes, norm)

    def one(factor):
        given = [first * factor, *rest], setting.indices[0]
        slope = jax.value_and_grad(loss, has_aux=True)
        (value, _), gradient = slope(*given)
        return {"loss": value, "gradient": jnp.linalg.norm(gradient[0])}

    return jax.vmap(one)(FACTORS)


@per_seed
def decayed(setting: Setting, *, sizes: Sizes, norm: Norm) -> jax.Array:
    """Losses with weight decay, and with a growing rate instead: (2, steps)."""
    t = np.arange(len(setting.indices))
    growing = DECAY_RATE * (1 - DECAY_RATE * DECAY) ** (-2.0 * t - 1)
    rates = np.stack([np.full(len(t), DECAY_RATE), growing])

    def one(rates, decay):
        kernels, loss = _start(setting, sizes, norm)
        sgd = _sgd(lambda step: rates[step], decay)
        return nets.train(loss, kernels, setting.indices, sgd)[1]

    return jax.vmap(one)(rates, np.array([DECAY, 0.0]))


def horizon(rate: float, decay: float) -> int:
    """Number of steps of a run: equilibrium is reached long before."""
    return round(8 / (rate * decay))


@per_seed
def angles(
    setting: Setting, pair: jax.Array, *, sizes: Sizes, norm: Norm
) -> jax.Array:
    """Angle by which each step rotates a kernel, in radians: (steps, layers).

    Root mean square over channels.
    """

    def watch(old, new, _):
        turned = [angular_update(old, new, path=(i,)) for i in range(len(old))]
        return jnp.stack([jnp.sqrt(jnp.square(a).mean()) for a in turned])

    kernels, loss = _start(setting, sizes, norm)
    sgd = _sgd(*pair)
    return nets.train(loss, kernels, setting.indices, sgd, watch=watch)[2]


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What `verdict` reports, one value per seed."""
    found = {}
    for name, rows in numbers["scaled"].items():
        loss, gradient = rows["loss"], rows["gradient"]
        change = np.abs(loss - loss[:, [UNIT]]).max(1)
        expected = gradient[:, [UNIT]] / FACTORS
        found[f"loss_change_{name}"] = change
        found[f"gradient_error_{name}"] = np.abs(gradient / expected - 1).max(1)
    for name, losses in numbers["decay"].items():
        difference = np.abs(losses[:, 0] - losses[:, 1])
        found[f"decay_difference_{name}"] = np.nanmax(difference, 1)
    for name, runs in numbers["angles"].items():
        ratios, reached = [], []
        for pair, turned in zip(numbers["pairs"], runs):
            steps = horizon(*pair)
            late = turned[:, steps * 3 // 4 : steps]
            rms = np.sqrt(np.square(late).mean(1))
            ratios.append(rms / equilibrium_angle(*pair))
            time, ratio = _course(pair, turned)
            first = time[np.argmax(ratio > 0.9, axis=1)]
            reached.append(np.where((ratio > 0.9).any(1), first, np.nan))
        # (seeds, pairs * layers) and (seeds, pairs)
        found[f"angle_over_theory_{name}"] = np.concatenate(ratios, 1)
        found[f"reached_{name}"] = np.stack(reached, 1)
    return found


def _course(
    pair: tuple[float, float], turned: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """steps * lr * wd (60,), and the angle relative to the theory (S, 60).

    Root mean square over layers and a sixtieth of the run.
    """
    steps = horizon(*pair)
    width = max(steps // 60, 1)
    ends, square = plots.by_steps(np.square(turned[:, :steps]).mean(2), width)
    time = (ends / width - 0.5) * width * np.prod(pair)
    return time, np.sqrt(square) / equilibrium_angle(*pair)


def verdict(numbers: dict[str, Any]) -> list[str]:
    ratio = numbers["angle_over_theory_with"]
    holds = (
        (numbers["loss_change_with"] < 1e-12)
        & (numbers["gradient_error_with"] < 1e-12)
        & (numbers["decay_difference_with"] < 1e-12)
        & (np.abs(ratio - 1) < 0.1).all(1)
    )
    found = {
        (key, name): largest(numbers[f"{key}_{name}"])
        for key in ("loss_change", "decay_difference")
        for name in METHODS
    }
    return [
        "Scaling the first kernel by 0.01 to 100 changes the loss by at most "
        f"{found['loss_change', 'with']} with epsilon 0, "
        f"{found['loss_change', 'epsilon']} with epsilon 1e-5 and "
        f"{found['loss_change', 'without']} without batch norm.",
        "The losses with weight decay and with a growing learning rate differ "
        f"by at most {found['decay_difference', 'with']} with epsilon 0, "
        f"{found['decay_difference', 'epsilon']} with epsilon 1e-5 and "
        f"{found['decay_difference', 'without']} without batch norm.",
        f"The angle of a step converges to {span(ratio, '.2f')} times "
        "sqrt(2 lr wd), and reaches 90% of it after "
        f"{span(numbers['reached_with'], '.1f')} / (lr wd) steps. Without "
        "batch norm it converges to "
        f"{span(numbers['angle_over_theory_without'], '.2f')} times that.",
        held("As published, with epsilon 0 (angle within 10%)", holds),
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    loss, gradient, decay, angle = axes
    for name, method in METHODS.items():
        if name != "epsilon":  # not visible beside epsilon 0
            rows = numbers["scaled"][name]
            plots.lines(loss, FACTORS, rows["loss"], method)
            plots.lines(gradient, FACTORS, rows["gradient"], method)
        losses = numbers["decay"][name]
        # A logarithmic axis has no place for a difference of zero.
        apart = np.maximum(np.abs(losses[:, 0] - losses[:, 1]), 1e-17)
        plots.lines(decay, np.arange(apart.shape[1]), apart, method, lw=1)
    unit = numbers["scaled"]["with"]["gradient"][0, UNIT]
    plots.theory(gradient, FACTORS, unit / FACTORS)
    for name, runs in numbers["angles"].items():
        for pair, style, turned in zip(
            numbers["pairs"], ("-", "--", ":"), runs
        ):
            time, ratio = _course(pair, turned)
            ratio = np.sqrt(np.square(ratio).mean(0))[None]
            line = Method(None, METHODS[name].color, style)
            plots.lines(angle, time, ratio, line, lw=1.5)
            if name == "with":  # the style has the same meaning for both
                label = f"lr {pair[0]}, wd {pair[1]}"
                angle.plot([], [], style, color=THEORY, lw=1.5, label=label)
    plots.level(angle, 1)
    loss.loglog()
    gradient.loglog()
    decay.semilogy()
    angle.set_ylim(0, 1.3)
    angle.legend(loc="center right", bbox_to_anchor=(1, 0.46))
    plots.note(gradient, 0.1, 0.92, "dashed: 1 / a")
    for place, x, y, method in (
        (loss, 0.4, 0.6, WITHOUT),
        (loss, 0.05, 0.12, WITH),
        (gradient, 0.05, 0.36, WITHOUT),
        (gradient, 0.5, 0.1, WITH),
        (decay, 0.12, 0.77, WITHOUT),
        (decay, 0.12, 0.55, METHODS["epsilon"]),
        (decay, 0.12, 0.14, METHODS["with"]),
        (angle, 0.4, 0.01, WITHOUT),
        (angle, 0.05, 0.9, WITH),
    ):
        plots.name(place, x, y, method)


PANELS = (
    "Loss with the first kernel scaled | scale a | initial loss (nats)",
    "Gradient of that kernel | scale a | gradient norm",
    "Weight decay vs. growing learning rate | step | difference in loss (nats)",
    "Rotation of the kernels | steps × lr × wd | angle per step / √(2·lr·wd)",
)
EXPERIMENT = Experiment(measure, verdict, draw, PANELS, shape=(2, 2), height=5)
