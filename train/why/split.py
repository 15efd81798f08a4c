"""Synchronized batch norm with one uneven shard.

Claim: A batch has one mean and one variance, however its examples are split
over devices. The unweighted average of the means of the devices differs from
it if their numbers of examples differ, and is NaN if a device has none.

Published: flax.linen.BatchNorm averages the mean and the mean square of each
device without weights (flax 0.12, normalization.py, _compute_stats). PyTorch's
SyncBatchNorm weights by counts, and takes no mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn.linen import BatchNorm
from train.why import nets, plots
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, per_seed
from train.why.methods import WITH, WITHOUT, Method
from train.why.words import held, largest, percent

DEVICES = 8
EACH = 8  # examples per device, including padding
LAST = (8, 4, 2, 1, 0)  # real examples on the last device
METHODS = {
    "flax": Method(
        "flax.linen.BatchNorm", WITHOUT.color, options={"norm": nn.BatchNorm}
    ),
    "jaxbn": Method("jaxbn", WITH.color, options={"norm": BatchNorm}),
}


class Net(nn.Module):
    """Three hidden layers of 64 units with batch norm."""

    norm: Callable[..., nn.Module]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None, *, train: bool) -> Any:
        for _ in range(3):
            x = nn.Dense(64, use_bias=False)(x)
            norm = self.norm(use_running_average=not train, momentum=0.9)
            x = nn.relu(norm(x, mask=mask))
        return nn.Dense(self.num_classes)(x)


class Trained(NamedTuple):
    """With one method, one number of examples and one seed."""

    gradient: Any  # of the first step, a tree
    losses: jax.Array  # (T,) in nats
    accuracy: jax.Array  # () on test images, with running statistics


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains with flax's layer, with jaxbn's, and on one device."""
    steps = 60 if settings.quick else 300
    size = DEVICES * EACH
    setting = data.setting(settings.seeds, steps=steps, batch_size=size)
    train = functools.partial(train_all, setting, num_classes=data.num_classes)
    truth = [train(norm=BatchNorm, last=n, together=True) for n in LAST]
    numbers: dict[str, Any] = {
        "examples_on_last": np.array(LAST),
        "one device": _numbers(truth, truth),
    }
    for name, method in METHODS.items():
        got = [train(last=n, **method.options) for n in LAST]
        numbers[name] = _numbers(got, truth)
    exact = np.all(numbers["jaxbn"]["gradient_error"] < 1e-4, axis=1)
    lost = np.isnan(numbers["flax"]["loss"][:, LAST.index(0)])
    return numbers | {"holds": exact & lost}


def _numbers(got: list[Trained], truth: list[Trained]) -> dict[str, Any]:
    """Arrays (S, len(LAST)); the loss is the mean of the last 20 steps."""
    pairs = [(a.gradient, b.gradient) for a, b in zip(got, truth)]
    return {
        "gradient_error": np.stack([relative_error(*p) for p in pairs], 1),
        "loss": np.stack([a.losses[:, -20:].mean(1) for a in got], 1),
        "test_accuracy": np.stack([a.accuracy for a in got], 1),
    }


def relative_error(got: Any, want: Any) -> np.ndarray:
    """|got - want| / |want| of trees with a leading axis S: (S,)."""
    norms = jax.vmap(optax.tree.norm)
    return norms(jax.tree.map(jnp.subtract, got, want)) / norms(want)


@per_seed
def train_all(
    setting: Setting,
    *,
    norm: Callable[..., nn.Module],
    last: int,
    num_classes: int,
    together: bool = False,
) -> Trained:
    """Trains on batches of which the last device has only `last` examples.

    The rest of its shard is padding. If `together`, the same examples are on
    one device, without padding.
    """
    size = (DEVICES - 1) * EACH + last
    shape = (1, size) if together else (DEVICES, EACH)
    held = (jnp.arange(shape[0] * shape[1]) < size).reshape(shape)
    indices = setting.indices[:, : held.size]
    net = Net(functools.partial(norm, axis_name="devices"), num_classes)

    def loss(params, batch_stats, index):
        x, labels = (
            a[index].reshape(*shape, *a.shape[1:]) for a in setting.train
        )
        device = functools.partial(net.apply, train=True, mutable="batch_stats")
        device = jax.vmap(device, (None, 0, 0), axis_name="devices")
        state = {"params": params, "batch_stats": batch_stats}
        mask = None if together else held[..., None]
        logits, new = device(state, jnp.where(held[..., None], x, 0), mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        new = jax.tree.map(lambda a: a[0], new["batch_stats"])
        return jnp.where(held, losses, 0).sum() / size, new

    slope = jax.value_and_grad(loss, has_aux=True)

    def step(state, index):
        (value, batch_stats), gradient = slope(*state, index)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state[0], gradient)
        return (params, batch_stats), value

    state = net.init(setting.key, setting.train[0][:2], train=False)
    start = state["params"], state["batch_stats"]
    (params, batch_stats), losses = jax.lax.scan(step, start, indices)
    state = {"params": params, "batch_stats": batch_stats}
    logits = net.apply(state, setting.test[0], train=False)
    right = nets.accuracy(logits, setting.test[1])
    return Trained(slope(*start, indices[0])[1], losses, right)


def verdict(numbers: dict[str, Any]) -> list[str]:
    flax, jaxbn = numbers["flax"], numbers["jaxbn"]
    one, empty = LAST.index(1), LAST.index(0)
    accuracy = {
        name: percent(numbers[name]["test_accuracy"][:, empty])
        for name in (*METHODS, "one device")
    }
    loss = "NaN" if np.isnan(flax["loss"][:, empty]).all() else "finite"
    return [
        "Relative error of the first gradient, compared with the same examples "
        "on one device: with one example on the last of eight devices, "
        f"{percent(flax['gradient_error'][:, one])} for flax (with eight "
        f"examples, {largest(flax['gradient_error'][:, 0])}); for jaxbn at "
        f"most {largest(jaxbn['gradient_error'])} in all cases.",
        f"With no example there, the loss of flax is {loss} and its test "
        f"accuracy {accuracy['flax']}; that of jaxbn is {accuracy['jaxbn']}, "
        f"and {accuracy['one device']} on one device.",
        held("jaxbn is exact, and flax NaN with no example", numbers["holds"]),
        "Uneven shards that are not empty do not change the test accuracy here "
        f"(flax, one example: {percent(flax['test_accuracy'][:, one])}).",
    ]


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    error, accuracy = axes
    x, empty = np.arange(len(LAST)), LAST.index(0)
    for name, method in METHODS.items():
        line = method._replace(style="o-")
        found = numbers[name]
        plots.band(error, x, 100 * found["gradient_error"], line)
        plots.band(accuracy, x, 100 * found["test_accuracy"], line)
    means = 100 * numbers["flax"]["gradient_error"].mean(0)
    text = {"ha": "center", "color": WITHOUT.color, "fontsize": 9}
    for place, value in zip(x[:empty], means):
        if value > 1:
            error.text(place, value + 3, f"{value:.0f}%", **text)
    text["weight"] = "bold"
    error.text(x[empty], means[empty - 1], "NaN", va="center", **text)
    accuracy.text(x[empty] - 0.25, 1, "NaN", **text | {"ha": "right"})
    plots.name(error, 0.05, 0.6, METHODS["flax"])
    plots.note(error, 0.4, 0.14, "jaxbn: equal to one device", WITH.color)
    plots.name(accuracy, 0.07, 0.83, METHODS["jaxbn"])
    plots.note(accuracy, 0.66, 0.5, "flax", WITHOUT.color)
    for place in axes:
        place.set_xticks(x, [str(n) for n in LAST])
        place.margins(x=0.08)
    error.set_ylim(-4, 55)
    accuracy.set_ylim(-4, 105)


_X = "examples on the last device (7 others: 8)"
PANELS = (
    f"Error of the first gradient | {_X} | relative error (%)",
    f"Accuracy after training | {_X} | test accuracy (%)",
)
EXPERIMENT = Experiment(
    measure,
    verdict,
    draw,
    PANELS,
    shape=(1, 2),
    height=2.9,
    grid={"width_ratios": (1.25, 1)},
)
