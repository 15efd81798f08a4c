"""Statistics kept out of the gradient.

Claim: A gradient step that takes the statistics for constants moves what
normalization then undoes: a bias grows for ever while the loss stays where it
is, and with variances in it models blow up (Ioffe and Szegedy 2015, section 2).

Published: for xhat = x - mean(x), x = u + b, the bias grows indefinitely while
the loss remains fixed; no figures. From the gradient follows b = 2 lr k mean(t)
after k steps on mean((xhat - t)^2).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import moments, normalize
from train.why import nets, plots
from train.why.arms import FOURTH, THEORY, WITH, WITHOUT, Arm
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, each, per_seed
from train.why.nets import Norm, Sizes
from train.why.words import say

MINIMAL_RATE, MINIMAL_STEPS = 0.1, 100
# Whether there is an affine map behind batch norm -> learning rate, steps.
# Without it the logits are normalized too: nothing else can absorb a change.
RUNS = {"bare": (False, 0.5, 600), "affine": (True, 0.1, 500)}
RISE = 1.2  # times the lowest loss, beyond the noise of batches
SMOOTH = 20  # steps that a loss is averaged over


def keep_out(h: jax.Array, scale: Any, bias: Any) -> Any:
    """Batch norm that takes mean and variance for constants, which is wrong."""
    known = jax.lax.stop_gradient(moments(h))
    return normalize(h, known.mean, known.var, scale, bias), known


# A plain net with free logits is no match for one without them.
BARE_ARMS = {
    "inside": WITH._replace(label="statistics in the gradient"),
    "outside": Arm("statistics kept out", FOURTH, options={"norm": keep_out}),
}
ARMS = BARE_ARMS | {"without": WITHOUT._replace(label="without batch norm")}


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    numbers: dict[str, Any] = {"minimal": minimal(settings.seeds)}
    for name, (affine, rate, steps) in RUNS.items():
        steps = 300 if settings.quick else steps
        setting = data.setting(settings.seeds, steps=steps, batch_size=128)
        arms, sizes = ARMS if affine else BARE_ARMS, data.sizes(64, 64)
        options = {"sizes": sizes, "affine": affine, "rate": rate}
        numbers[name] = each(arms, train, setting, **options)
    return numbers | {"summary": _summary(numbers)}


def minimal(seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One bias before one mean, in float64, with either gradient.

    L = mean((xhat - t)^2), x = u + b, xhat = x - mean(x); the full gradient
    in b is 0, the one that holds the mean constant is -2 mean(t).

    Returns:
      inside and outside, b behind each step (S, steps); loss_inside and
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
        for arm, outside in (("inside", False), ("outside", True)):
            _, losses, bias = jax.device_get(every(u, t, outside))
            found |= {arm: bias, f"loss_{arm}": losses}
    return found


def init(
    key: jax.Array, sizes: Sizes, *, norm: Norm, affine: bool
) -> nets.Params:
    """Draws a net with a bias before batch norm, of all layers but the head.

    Without affine map that is the only bias, and the head has one too.
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
    """Returns what each step leaves behind, all (steps,).

    loss; bias, norm of the first layer's bias before batch norm; head, norm of
    the head's kernel.
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
    """What the caption says, one number a seed."""
    small = numbers["minimal"]
    expected = 2 * MINIMAL_RATE * MINIMAL_STEPS * small["mean_t"]
    found = {
        "minimal_error": np.abs(small["outside"][:, -1] / expected - 1),
        "minimal_loss_change": np.ptp(small["loss_outside"], axis=1),
        "minimal_inside": np.abs(small["inside"]).max(1),
    }
    for name in RUNS:
        for arm in BARE_ARMS:
            rows = numbers[name][arm]
            _, losses = plots.by_steps(rows["loss"], SMOOTH)
            head = rows["head"]
            found |= {
                f"{name}_{arm}_lowest": losses.min(1),
                f"{name}_{arm}_last": losses[:, -1],
                f"{name}_{arm}_bias": rows["bias"][:, -1],
                f"{name}_{arm}_head": head[:, -1] / head[:, 0],
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
    blown = found["affine_outside_last"] > RISE * found["affine_outside_lowest"]
    return say(
        "the bias follows 2 lr k mean(t) to {minimal_error:max}, the loss "
        "moves by {minimal_loss_change:max}; with the full gradient it stays "
        "at {minimal_inside:max}. A net without affine map whose statistics "
        "are kept out gets to loss {bare_outside_lowest:.2f} and is back at "
        "{bare_outside_last:.2f} after {steps[bare]:.0f} steps (done right: "
        "{bare_inside_last:.2f}), its head {bare_outside_head:.1f} times as "
        "long (right: {bare_inside_head:.2f}). {holds:verdict} With scale and "
        "bias behind batch norm the loss rose again on {blown} seeds: it ends "
        "at {affine_outside_last:.2g} (right: {affine_inside_last:.2g}) after "
        "{steps[affine]:.0f} steps, |b| at {affine_outside_bias:.1f}.",
        **found,
        holds=holds,
        blown=f"{blown.sum()} of {blown.size}",
        steps={name: numbers[name]["inside"]["loss"].shape[1] for name in RUNS},
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    bias, norms, *losses = axes
    found, steps = numbers["minimal"], np.arange(1, MINIMAL_STEPS + 1)
    expected = 2 * MINIMAL_RATE * steps * found["mean_t"][:, None]
    for name, arm in BARE_ARMS.items():
        plots.lines(bias, steps, found[name], arm)
        for key, label, style in (
            ("head", "head's kernel", "-"),
            ("bias", "first bias", ":"),
        ):
            rows = numbers["bare"][name][key]
            line = arm._replace(label=f"{label}, {arm.label}", style=style)
            plots.lines(norms, np.arange(rows.shape[1]), rows, line)
    plots.lines(bias, steps, expected, Arm("2 lr k mean(t)", THEORY, "--"))
    norms.set_ylim(top=1.5 * norms.get_ylim()[1])
    for place, run in zip(losses, RUNS):
        for name, rows in numbers[run].items():
            steps, means = plots.by_steps(rows["loss"], SMOOTH)
            plots.lines(place, steps - SMOOTH / 2, means, ARMS[name])
        place.set_ylim(0)


PANELS = (
    "One bias before one mean | step k | bias b",
    "Net without scale and bias: its parameters | step | norm",
    "Net without scale and bias: its loss | step | training loss (nats)",
    "Net with scale and bias: its loss | step | training loss (nats)",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(2, 2), size=(9, 6.2)
)
