"""Gradients that ignore the statistics.

Claim: A gradient step that treats the statistics as constants makes changes
that the normalization removes again: a bias grows without bound while the loss
stays the same, and if variances are treated so, the model blows up (Ioffe and
Szegedy 2015, section 2).

Published: For xhat = x - mean(x) with x = u + b, the bias grows indefinitely
while the loss remains fixed; no figures. The gradient implies
b = 2 lr k mean(t) after k steps on mean((xhat - t)^2).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import moments, normalize
from train.why import nets, plots
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.methods import FOURTH, THEORY, WITH, WITHOUT, Method
from train.why.nets import Norm, Sizes
from train.why.words import held, largest, span

MINIMAL_RATE, MINIMAL_STEPS = 0.1, 100
# Whether batch norm has scale and bias, learning rate, steps. In "bare" the
# logits are normalized too, so that no parameter can absorb a change.
RUNS = {"bare": (False, 0.5, 600), "affine": (True, 0.1, 500)}
RISE = 1.2  # times the lowest loss, more than the noise of batches
SMOOTH = 20  # steps over which losses are averaged


def keep_out(h: jax.Array, scale: Any, bias: Any) -> Any:
    """Batch norm that treats mean and variance as constants, which is wrong."""
    known = jax.lax.stop_gradient(moments(h))
    return normalize(h, known.mean, known.var, scale, bias), known


# Without batch norm logits are free, which cannot be compared with "bare".
BARE_METHODS = {
    "inside": WITH._replace(label="full gradient"),
    "outside": Method(
        "constant statistics", FOURTH, options={"norm": keep_out}
    ),
}
METHODS = BARE_METHODS | {"without": WITHOUT}


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    numbers: dict[str, Any] = {"minimal": minimal(settings.seeds)}
    sizes = data.sizes(64, 64)
    for name, (affine, rate, steps) in RUNS.items():
        steps = 300 if settings.quick else steps
        setting = data.setting(settings.seeds, steps=steps, batch_size=128)
        methods = METHODS if affine else BARE_METHODS
        options = {"sizes": sizes, "affine": affine, "rate": rate}
        numbers[name] = each(methods, train, setting, **options)
    return numbers | {"summary": _summary(numbers)}


def minimal(seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One bias before the subtraction of the mean, in float64.

    L = mean((xhat - t)^2), x = u + b, xhat = x - mean(x). The full gradient in
    b is 0; with the mean as a constant it is -2 mean(t).

    Returns:
      inside and outside, b after each step (S, steps); loss_inside and
      loss_outside, before it; mean_t (S,).
    """

    def descend(u, t, outside):
        def loss(b, _):
            x = u + b
            mean = moments(x[:, None]).mean[0]
            mean = jnp.where(outside, jax.lax.stop_gradient(mean), mean)
            return jnp.square(x - mean - t).mean(), None

        steps, sgd = jnp.arange(MINIMAL_STEPS), optax.sgd(MINIMAL_RATE)
        start = jnp.zeros((), u.dtype)
        return nets.train(loss, start, steps, sgd, watch=lambda _, b, __: b)

    drawn = [np.random.default_rng(seed) for seed in seeds]
    u = np.stack([rng.normal(size=64) for rng in drawn])
    t = np.stack([rng.normal(1.0, 1.0, 64) for rng in drawn])
    found = {"mean_t": t.mean(1)}
    with jax.enable_x64(True):
        every = jax.jit(jax.vmap(descend, (0, 0, None)))
        for name, outside in (("inside", False), ("outside", True)):
            _, losses, bias = jax.device_get(every(u, t, outside))
            found |= {name: bias, f"loss_{name}": losses}
    return found


def init(
    key: jax.Array, sizes: Sizes, *, norm: Norm, affine: bool
) -> nets.Params:
    """Draws a network whose hidden layers have a bias before batch norm.

    If not affine, they have no other bias, and the head is normalized too.
    """

    def changed(layer):
        kept = layer if affine else {"kernel": layer["kernel"]}
        return kept | {"before": jnp.zeros_like(layer["bias"])}

    params = nets.init(key, sizes, norm=norm)
    head = params["head"] if affine else changed(params["head"])
    return {"hidden": [*map(changed, params["hidden"])], "head": head}


@per_seed
def train(
    setting: Setting, *, sizes: Sizes, norm: Norm, affine: bool, rate: float
) -> dict[str, jax.Array]:
    """Returns loss, bias and head, (steps,) each.

    The norms of the first layer's bias before batch norm and of the head's
    kernel are those after each step.
    """

    def watch(_, new, __):
        bias, head = new["hidden"][0]["before"], new["head"]["kernel"]
        return {"bias": jnp.linalg.norm(bias), "head": jnp.linalg.norm(head)}

    params = init(setting.key, sizes, norm=norm, affine=affine)
    loss = nets.loss_on(setting.train, norm=norm)
    _, losses, kept = nets.train(
        loss, params, setting.indices, optax.sgd(rate), watch=watch
    )
    return {"loss": losses, **kept}


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What `verdict` reports, one value per seed."""
    small = numbers["minimal"]
    expected = 2 * MINIMAL_RATE * MINIMAL_STEPS * small["mean_t"]
    found = {
        "minimal_error": np.abs(small["outside"][:, -1] / expected - 1),
        "minimal_loss_change": np.ptp(small["loss_outside"], axis=1),
        "minimal_inside": np.abs(small["inside"]).max(1),
    }
    for name in RUNS:
        for method in BARE_METHODS:
            rows, key = numbers[name][method], f"{name}_{method}"
            _, losses = plots.by_steps(rows["loss"], SMOOTH)
            head = rows["head"]
            found |= {
                f"{key}_lowest": losses.min(1),
                f"{key}_last": losses[:, -1],
                f"{key}_bias": rows["bias"][:, -1],
                f"{key}_head": head[:, -1] / head[:, 0],
            }
    return found


def verdict(numbers: dict[str, Any]) -> str:
    found = numbers["summary"]
    holds = (
        (found["minimal_error"] < 1e-9)
        & (found["minimal_inside"] < 1e-9)
        & (found["bare_outside_last"] > RISE * found["bare_outside_lowest"])
        & (found["bare_outside_head"] > 2 * found["bare_inside_head"])
    )
    rises = found["affine_outside_last"] > RISE * found["affine_outside_lowest"]
    steps = {name: numbers[name]["inside"]["loss"].shape[1] for name in RUNS}
    return [
        "With the mean as a constant, the bias is 2 lr k mean(t) within "
        f"{largest(found['minimal_error'])}, and the loss changes by "
        f"{largest(found['minimal_loss_change'])}. With the full gradient, the "
        f"bias is at most {largest(found['minimal_inside'])}.",
        "A network without scale and bias, trained with constant statistics, "
        f"reaches a loss of {span(found['bare_outside_lowest'], '.2f')}, and "
        f"of {span(found['bare_outside_last'], '.2f')} after {steps['bare']} "
        f"steps (full gradient: {span(found['bare_inside_last'], '.2f')}). The "
        f"weights of its last layer grow "
        f"{span(found['bare_outside_head'], '.1f')} times (full gradient: "
        f"{span(found['bare_inside_head'], '.2f')}). "
        + held("The weights grow, and the loss rises again", holds),
        held("With scale and bias, the loss also rises again", rises)
        + f" After {steps['affine']} steps it is "
        f"{span(found['affine_outside_last'], '.2g')} (full gradient: "
        f"{span(found['affine_inside_last'], '.2g')}), and the norm of the "
        f"bias {span(found['affine_outside_bias'], '.1f')}.",
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    bias, norms, *losses = axes
    found, steps = numbers["minimal"], np.arange(1, MINIMAL_STEPS + 1)
    expected = 2 * MINIMAL_RATE * steps * found["mean_t"][:, None]
    for name, method in BARE_METHODS.items():
        plots.lines(bias, steps, found[name], method)
        for key, label, style in (
            ("head", "last weights", "-"),
            ("bias", "first bias", ":"),
        ):
            rows = numbers["bare"][name][key]
            label = f"{label}, {method.label}"
            line = method._replace(label=label, style=style)
            plots.lines(norms, np.arange(rows.shape[1]), rows, line)
    law = Method("theory: 2 lr k mean(t)", THEORY, "--")
    plots.lines(bias, steps, expected, law)
    norms.set_ylim(top=1.8 * norms.get_ylim()[1])
    for place, run in zip(losses, RUNS):
        for name, rows in numbers[run].items():
            steps, means = plots.by_steps(rows["loss"], SMOOTH)
            plots.lines(place, steps - SMOOTH / 2, means, METHODS[name])
        place.set_ylim(0)
    for place in axes:
        place.legend()


PANELS = (
    "One bias before the mean | step k | bias b",
    "Norms, without scale and bias | step | norm",
    "Loss, without scale and bias | step | training loss (nats)",
    "Loss, with scale and bias | step | training loss (nats)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), height=5.4
)
