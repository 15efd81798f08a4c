"""Batch norm in an LSTM that reads images pixel by pixel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
from train.why import lstm, nets, plots
from train.why.arms import THEORY, THIRD, WITH, WITHOUT, Arm, each
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, say

Params = dict[str, jax.Array]

# scale: of batch norm at the start; it is there to be ignored without.
ARMS = {
    "without": WITHOUT._replace(options={"norm": False, "scale": 1.0}),
    "scale 0.1": Arm(
        "batch norm, scale 0.1",
        WITH.color,
        options={"norm": True, "scale": 0.1},
    ),
    "scale 1": Arm(
        "batch norm, scale 1", THIRD, options={"norm": True, "scale": 1.0}
    ),
}

_TIMES = 64
_BATCH = 64
_RATE = 2e-3  # of Adam
_NOISE = 0.1  # standard deviation of the hidden state at the start
_LAST = 25  # steps that count as the end of training
# Examples that population statistics are taken over: all steps of all of them
# are in memory at once.
_POPULATION = 4000


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains LSTMs without batch norm and with two scales at the start."""
    steps = 60 if settings.quick else 300
    setting = data.setting(settings.seeds, steps=steps, batch_size=_BATCH)
    setting = setting._replace(
        train=(_in_time(data.train_x), data.train_y),
        test=(_in_time(data.test_x), data.test_y),
    )
    arms = each(ARMS, _measure, setting, classes=data.num_classes)
    return {**arms, "holds": _holds(arms)}


def _in_time(x: np.ndarray) -> np.ndarray:
    """(N, D) to (T, N, D / T): one pixel a step of digits."""
    steps = x.reshape(len(x), _TIMES, -1)
    return np.ascontiguousarray(steps.transpose(1, 0, 2))


@functools.partial(jax.jit, static_argnames=("norm", "classes"))
def _measure(
    setting: Setting, scale: jax.Array, *, norm: bool, classes: int
) -> dict[str, jax.Array]:
    train = setting.train

    def one(key, indices):
        start, noise = jax.random.split(key)
        inputs = train[0].shape[-1]
        params = lstm.init(start, inputs, classes, norm=norm, scale=scale)
        first = tuple(jnp.take(a, indices[0], i) for a, i in zip(train, (1, 0)))
        norms = _gradient_norms(params, first, noise)
        params, right = _fit(params, train, indices, noise)
        return {
            "train_accuracy": right,
            "gradient_norms": norms,
            **_test(params, train[0][:, :_POPULATION], setting.test, noise),
        }

    return jax.vmap(one)(setting.keys, setting.indices)


def _noise(key: jax.Array, examples: int) -> jax.Array:
    return _NOISE * jax.random.normal(key, (examples, lstm.UNITS))


def _gradient_norms(params: Params, batch: Any, key: jax.Array) -> jax.Array:
    """Norm of the gradient of the loss by each hidden state, (T,)."""
    x, labels = batch
    start = _noise(key, x.shape[1])

    def loss(perturbation):
        logits = lstm.apply(params, x, start, perturbation=perturbation).logits
        return nets.cross_entropy(logits, labels)

    gradient = jax.grad(loss)(jnp.zeros((*x.shape[:2], lstm.UNITS)))
    return jnp.sqrt(jnp.square(gradient).sum((1, 2)))


def _fit(
    params: Params, train: Any, indices: jax.Array, key: jax.Array
) -> tuple[Params, jax.Array]:
    """Returns trained parameters and the accuracy on each batch, (T,)."""
    adam = optax.adam(_RATE)

    def loss(params, index, key):
        labels = train[1][index]
        start = _noise(key, len(index))
        logits = lstm.apply(params, train[0][:, index], start).logits
        right = (logits.argmax(-1) == labels).mean()
        return nets.cross_entropy(logits, labels), right

    def step(carry, given):
        params, state = carry
        number, index = given
        gradient, right = jax.grad(loss, has_aux=True)(
            params, index, jax.random.fold_in(key, number)
        )
        updates, state = adam.update(gradient, state)
        return (optax.apply_updates(params, updates), state), right

    start = params, adam.init(params)
    numbered = jnp.arange(len(indices)), indices
    (params, _), right = jax.lax.scan(step, start, numbered)
    return params, right


def _test(
    params: Params, x: jax.Array, test: Any, key: jax.Array
) -> dict[str, jax.Array]:
    """Test accuracy with statistics of each step, and with one of all."""
    seen = lstm.apply(params, x, _noise(key, x.shape[1])).moments
    per_step = tuple(
        jaxbn.RunningStats(m.mean, jax.vmap(lambda m: m.var)(m)) for m in seen
    )
    pooled = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (_TIMES, *a.shape)),
        tuple(map(jaxbn.pool, per_step)),
    )
    start = jnp.zeros((test[0].shape[1], lstm.UNITS))

    def accuracy(statistics):
        out = lstm.apply(params, test[0], start, statistics=statistics)
        return (out.logits.argmax(-1) == test[1]).mean()

    return {"per step": accuracy(per_step), "pooled": accuracy(pooled)}


def _trained(arm: dict[str, np.ndarray]) -> np.ndarray:
    return arm["train_accuracy"][:, -_LAST:].mean(1)


def _holds(arms: dict[str, Any]) -> dict[str, np.ndarray]:
    """Which claims held, on which seeds."""
    small, large = arms["scale 0.1"], arms["scale 1"]
    kept = [
        arm["gradient_norms"][:, 0] / arm["gradient_norms"][:, -1]
        for arm in (large, small)
    ]
    return {
        "per step": np.all(
            [arm["per step"] > arm["pooled"] for arm in (small, large)], axis=0
        ),
        "small scale": _trained(small) > _trained(large),
        "vanishes": kept[0] < kept[1],
        "better than without": small["per step"] > arms["without"]["per step"],
    }


def verdict(numbers: dict[str, Any]) -> str:
    trained = ", ".join(f"{name} {{trained[{name}]:.2f}}" for name in ARMS)
    tested = ", ".join(
        f"{name} {{arms[{name}][per step]:.2f}} and "
        f"{{arms[{name}][pooled]:.2f}}"
        for name in ("scale 0.1", "scale 1")
    )
    return say(
        f"training accuracy: {trained}; scale 0.1 above scale 1: "
        "{holds[small scale]:tally}. Test accuracy with statistics per step "
        f"and pooled over time: {tested}; per step above pooled: "
        "{holds[per step]:tally}. Test accuracy without batch norm "
        "{arms[without][per step]:.2f}; scale 0.1 above that: "
        "{holds[better than without]:tally}, which a run as short as this does "
        "not settle. Gradients at the start fall off faster on their way back "
        "with scale 1 than with 0.1: {holds[vanishes]:tally}.",
        arms=numbers,
        trained={name: _trained(numbers[name]) for name in ARMS},
        holds=numbers["holds"],
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    training, test, gradients = axes
    for i, (name, arm) in enumerate(ARMS.items()):
        found = numbers[name]
        steps, means = plots.by_steps(100 * found["train_accuracy"], 20)
        plots.band(training, steps, means, arm)
        norms = found["gradient_norms"]
        times, line = np.arange(1, _TIMES + 1), arm._replace(label=None)
        plots.band(gradients, times, norms / norms[:, -1:], line)
        kinds = {"per step": ("s", arm.color), "pooled": ("D", "white")}
        if name == "without":  # no statistics: one test accuracy
            kinds = {"per step": ("o", arm.color)}
        for j, (kind, (marker, fill)) in enumerate(kinds.items()):
            x = np.full(
                len(found[kind]), i + (j - 0.5) * 0.4 * (len(kinds) - 1)
            )
            test.plot(x, 100 * found[kind], marker, color=arm.color, mfc=fill)
    for marker, fill, label in (
        ("s", THEORY, "statistics of each time step"),
        ("D", "white", "pooled over time"),
    ):
        test.plot([], [], marker, color=THEORY, mfc=fill, label=label)
    training.set_ylim(0, 100)
    test.set(ylim=(0, 100), xlim=(-0.6, 2.6))
    test.set_xticks(range(len(ARMS)), list(ARMS))
    gradients.semilogy()


EXPERIMENT = Experiment(
    "recurrent",
    "An LSTM that reads an image in 64 steps",
    claim=(
        "Batch norm works between the steps of a recurrent net too, if its "
        "scale starts at 0.1 rather than 1 and every time step has population "
        "statistics of its own."
    ),
    published=(
        "MNIST in 784 steps, test accuracy: LSTM 98.9%, with batch norm 99.0%; "
        "pixels permuted 90.2% and 95.4%. Scale 1 drives tanh into saturation, "
        "and gradients vanish on their way back (Cooijmans et al. 2017, "
        "Recurrent Batch Normalization)."
    ),
    measure=measure,
    verdict=verdict,
    draw=draw,
    panels=(
        "Training | step | accuracy (%)",
        "Test, by what batch norm infers with |  | accuracy (%)",
        "Gradients at the start of training | time step t | "
        "|dL / dh(t)| over that of the last t",
    ),
    shape=(1, 3),
    size=(10.5, 3.7),
    grid={"width_ratios": (1, 0.9, 1)},
)
