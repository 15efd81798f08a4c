"""The gradient must go through the statistics: what happens when it does not.

The reason that batch norm is a layer and not a rescaling between steps.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxbn import moments
from train.why import data, draw, finding, nets
from train.why.finding import Finding, Settings

CLAIM = (
    "A gradient step that takes the statistics for constants moves what "
    "normalization then undoes: a bias grows for ever while the loss stays "
    "where it is, and with variances in it models blow up (Ioffe and Szegedy "
    "2015, section 2)."
)
PUBLISHED = (
    "for xhat = x - mean(x), x = u + b, the bias grows indefinitely while the "
    "loss remains fixed; no figures. From the gradient follows b = 2 lr k "
    "mean(t) after k steps on mean((xhat - t)^2)."
)

HIDDEN, BATCH = (64, 64), 128
MINIMAL_RATE, MINIMAL_STEPS = 0.1, 100
# Whether there is an affine map behind batch norm -> learning rate, steps.
# Without it the logits are normalized too: nothing else can absorb a change.
RUNS = {"bare": (False, 0.5, 600), "affine": (True, 0.1, 500)}
RISE = 1.2  # times the lowest loss, beyond the noise of batches
SMOOTH = 20  # steps that a loss is averaged over
WAYS = ("inside", "outside", "without")
STYLES = {
    "inside": (finding.WITH, "statistics in the gradient"),
    "outside": (finding.FOURTH, "statistics kept out"),
    "without": (finding.WITHOUT, "without batch norm"),
}


def run(settings: Settings) -> Finding:
    found = data.load(settings)
    numbers: dict[str, Any] = {"minimal": minimal(settings.seeds)}
    for name, (affine, rate, steps) in RUNS.items():
        steps = 300 if settings.quick else steps
        # A plain net with free logits is no match for one without them.
        numbers[name] = {
            way: train(found, settings.seeds, way, affine, rate, steps)
            for way in (WAYS if affine else WAYS[:2])
        }
    numbers["summary"] = _summary(numbers)
    return Finding(
        "gradient",
        "Statistics kept out of the gradient",
        CLAIM,
        PUBLISHED,
        _words(numbers),
        numbers,
        functools.partial(_draw, numbers),
    )


def minimal(seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One bias before one mean, in float64, with either gradient.

    L = mean((xhat - t)^2), x = u + b, xhat = x - mean(x); the full gradient
    in b is 0, the one that holds the mean constant is -2 mean(t).

    Returns:
      inside and outside, b behind each step (S, steps); loss_inside and
      loss_outside, before it; mean_t (S,).
    """

    def descend(u, t, outside):
        def loss(b):
            x = u + b
            mean = moments(x[:, None]).mean[0]
            mean = jnp.where(outside, jax.lax.stop_gradient(mean), mean)
            return jnp.square(x - mean - t).mean()

        def step(b, _):
            value, slope = jax.value_and_grad(loss)(b)
            new = b - MINIMAL_RATE * slope
            return new, (new, value)

        start = jnp.zeros((), u.dtype)
        return jax.lax.scan(step, start, length=MINIMAL_STEPS)[1]

    drawn = [np.random.default_rng(seed) for seed in seeds]
    u = np.stack([rng.normal(size=64) for rng in drawn])
    t = np.stack([rng.normal(1.0, 1.0, 64) for rng in drawn])
    found = {"mean_t": t.mean(1)}
    with jax.enable_x64(True):
        every = jax.jit(jax.vmap(descend, (0, 0, None)))
        for way, outside in (("inside", False), ("outside", True)):
            b, losses = every(u, t, outside)
            found[way] = np.asarray(b)
            found[f"loss_{way}"] = np.asarray(losses)
    return found


def train(
    found: data.Data,
    seeds: tuple[int, ...],
    way: str,
    affine: bool,
    rate: float,
    steps: int,
) -> dict[str, np.ndarray]:
    """Trains a net in one of WAYS; all (S, steps).

    Returns:
      loss; bias, norm of the first layer's bias before batch norm; head, norm
      of the head's kernel.
    """
    norm = way != "without"
    sizes = (found.train_x.shape[1], *HIDDEN, found.num_classes)
    loss = nets.loss_of(
        norm=norm,
        stop_statistics=way == "outside",
        norm_logits=norm and not affine,
    )

    def watch(_, new):
        return {
            "bias": jnp.linalg.norm(new["layer0"]["before"]),
            "head": jnp.linalg.norm(new["head"]["kernel"]),
        }

    def one(key, places, examples):
        params = nets.init(key, sizes, norm=norm, affine=affine, before=True)
        _, losses, kept = nets.sgd(
            loss, params, examples, places, rate, watch=watch
        )
        return {"loss": losses, **kept}

    places = data.places_by_seed(
        len(found.train_y), batch_size=BATCH, steps=steps, seeds=seeds
    )
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    every = jax.jit(jax.vmap(one, (0, 0, None)))
    found = every(keys, places, (found.train_x, found.train_y))
    return {name: np.asarray(rows) for name, rows in found.items()}


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the caption tells, one number a seed."""
    small = numbers["minimal"]
    expected = 2 * MINIMAL_RATE * MINIMAL_STEPS * small["mean_t"]
    told = {
        "minimal_error": np.abs(small["outside"][:, -1] / expected - 1),
        "minimal_loss_change": np.ptp(small["loss_outside"], axis=1),
        "minimal_inside": np.abs(small["inside"]).max(1),
    }
    for name in RUNS:
        for way in WAYS[:2]:
            rows = numbers[name][way]
            _, losses = draw.by_steps(rows["loss"], SMOOTH)
            told[f"{name}_{way}_lowest"] = losses.min(1)
            told[f"{name}_{way}_last"] = losses[:, -1]
            told[f"{name}_{way}_bias"] = rows["bias"][:, -1]
            told[f"{name}_{way}_head"] = (
                rows["head"][:, -1] / rows["head"][:, 0]
            )
    return told


def _words(numbers: dict[str, Any]) -> str:
    told, span = numbers["summary"], finding.span
    holds = (
        (told["minimal_error"] < 1e-9)
        & (told["minimal_inside"] < 1e-9)
        & (told["bare_outside_last"] > RISE * told["bare_outside_lowest"])
        & (told["bare_outside_head"] > 2 * told["bare_inside_head"])
    )
    steps = {name: numbers[name]["inside"]["loss"].shape[1] for name in RUNS}
    blown = told["affine_outside_last"] > RISE * told["affine_outside_lowest"]
    return (
        "the bias follows 2 lr k mean(t) to "
        f"{finding.number(told['minimal_error'].max())}"
        ", the loss moves by "
        f"{finding.number(told['minimal_loss_change'].max())}; with the full "
        f"gradient it stays at {finding.number(told['minimal_inside'].max())}. "
        "A net without affine map whose statistics are kept out gets to loss "
        f"{span(told['bare_outside_lowest'], '.2f')} and is back at "
        f"{span(told['bare_outside_last'], '.2f')} after {steps['bare']} steps "
        f"(done right: {span(told['bare_inside_last'], '.2f')}), its head "
        f"{span(told['bare_outside_head'], '.1f')} times as long (right: "
        f"{span(told['bare_inside_head'], '.2f')}). "
        + finding.verdict(holds)
        + " With scale and bias behind batch norm the loss rose again on "
        f"{blown.sum()} of {blown.size} seeds: it ends at "
        f"{span(told['affine_outside_last'], '.2g')} (right: "
        f"{span(told['affine_inside_last'], '.2g')}) after {steps['affine']} "
        f"steps, |b| at {span(told['affine_outside_bias'], '.1f')}."
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(9, 6.2)
    (bias, size), (bare, affine) = figure.subplots(2, 2)
    small = numbers["minimal"]
    steps = np.arange(1, MINIMAL_STEPS + 1)
    for way in WAYS[:2]:
        color, label = STYLES[way]
        bias.plot(steps, small[way].T, color=color, alpha=0.7)
        bias.plot([], [], color=color, label=label)
    for i, mean in enumerate(small["mean_t"]):
        theory = 2 * MINIMAL_RATE * steps * mean
        label = "2 lr k mean(t)" if i == 0 else None
        bias.plot(steps, theory, "--", color=finding.THEORY, label=label)
    bias.set(xlabel="step k", ylabel="bias b")
    bias.set_title("One bias before one mean")
    for way in WAYS[:2]:
        color, label = STYLES[way]
        rows = numbers["bare"][way]
        size.plot(rows["head"].T, color=color, alpha=0.7)
        size.plot(rows["bias"].T, ":", color=color, alpha=0.7)
        size.plot([], [], color=color, label=f"head's kernel, {label}")
        size.plot([], [], ":", color=color, label=f"first bias, {label}")
    size.set(
        xlabel="step", ylabel="norm", ylim=(None, 1.5 * size.get_ylim()[1])
    )
    size.set_title("Net without scale and bias: its parameters")
    for axes, name, title in (
        (bare, "bare", "Net without scale and bias: its loss"),
        (affine, "affine", "Net with scale and bias: its loss"),
    ):
        for way, rows in numbers[name].items():
            color, label = STYLES[way]
            _, losses = draw.by_steps(rows["loss"], SMOOTH)
            places = (np.arange(losses.shape[1]) + 0.5) * SMOOTH
            axes.plot(places, losses.T, color=color, alpha=0.7)
            axes.plot([], [], color=color, label=label)
        axes.set(xlabel="step", ylabel="training loss (nats)", ylim=(0, None))
        axes.set_title(title)
    for axes in (bias, size, bare, affine):
        axes.legend()
