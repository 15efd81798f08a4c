"""One uneven shard.

Claim: A batch has one mean and one variance, however its examples lie on
devices. A mean of the devices' means is another number as soon as their shares
differ, and no number once one of them is empty.

Published: The layer flax.linen.BatchNorm takes the mean over devices of each
device's mean and mean square (flax 0.12, normalization.py, _compute_stats).
PyTorch's SyncBatchNorm gathers counts along with them, and takes no mask.
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
from train.why.arms import WITH, WITHOUT, Arm
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, per_seed
from train.why.words import say

DEVICES = 8
EACH = 8  # places on a device
LAST = (8, 4, 2, 1, 0)  # examples on the last device; the others are full
ARMS = {
    "flax": Arm("flax", WITHOUT.color, options={"norm": nn.BatchNorm}),
    "jaxbn": Arm("jaxbn", WITH.color, options={"norm": BatchNorm}),
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
    """Of one arm, one share and one seed."""

    gradient: Any  # tree, of the first step
    losses: jax.Array  # (T,) of the step's batch, in nats
    accuracy: jax.Array  # () on test images, with running statistics


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains with flax's layer and with jaxbn's; the truth is one device."""
    steps = 60 if settings.quick else 300
    size = DEVICES * EACH
    setting = data.setting(settings.seeds, steps=steps, batch_size=size)
    train = functools.partial(train_all, setting, num_classes=data.num_classes)
    truth = [train(norm=BatchNorm, last=n, together=True) for n in LAST]
    numbers: dict[str, Any] = {
        "chance": 1 / data.num_classes,
        "examples_on_last": np.array(LAST),
        "one device": _numbers(truth, truth),
    }
    for name, arm in ARMS.items():
        got = [train(last=n, **arm.options) for n in LAST]
        numbers[name] = _numbers(got, truth)
    exact = np.all(numbers["jaxbn"]["gradient_error"] < 1e-4, axis=1)
    lost = np.isnan(numbers["flax"]["loss"][:, LAST.index(0)])
    return numbers | {"holds": exact & lost}


def _numbers(got: list[Trained], truth: list[Trained]) -> dict[str, Any]:
    """Arrays (S, shares), a row a seed; the loss is that of 20 last steps."""
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
    """Trains a net on batches of which the last device holds `last` examples.

    Its other places are padding. With together, the examples lie on one device
    instead, unpadded.
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


def verdict(numbers: dict[str, Any]) -> str:
    flax, jaxbn = numbers["flax"], numbers["jaxbn"]
    return say(
        "against the same examples on one device, the gradient of the first "
        "step is off by {one:.2f} of itself with flax where the last of eight "
        "devices holds one example ({even:max} with even shares), {exact:max} "
        "at most with jaxbn. Where it holds none, flax's loss is {loss} and "
        "its test accuracy {accuracy[flax]:.2f}, jaxbn's "
        "{accuracy[jaxbn]:.2f}, as {accuracy[one device]:.2f} on one device. "
        "An uneven shard alone does not show in the accuracy here: "
        "{holds:tally} have jaxbn exact and flax lost.",
        one=flax["gradient_error"][:, LAST.index(1)],
        even=flax["gradient_error"][:, 0],
        exact=jaxbn["gradient_error"],
        loss="NaN" if np.isnan(flax["loss"][:, -1]).all() else "a number",
        accuracy={
            name: numbers[name]["test_accuracy"][:, -1]
            for name in (*ARMS, "one device")
        },
        holds=numbers["holds"],
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    x = np.arange(len(LAST))
    units = {"gradient_error": 1, "loss": 1, "test_accuracy": 100}
    for place, (key, unit) in zip(axes, units.items()):
        for name, arm in ARMS.items():
            values = unit * numbers[name][key]
            plots.band(place, x, values, arm._replace(style="o-"))
            where = {"transform": place.get_xaxis_transform(), "ha": "center"}
            text = {"va": "top", "color": arm.color, "weight": "bold"}
            for n in x[np.isnan(values).any(0)]:
                place.text(n, 0.88, "NaN", **text, **where)
        if key != "gradient_error":
            truth = unit * numbers["one device"][key].mean(0)
            plots.theory(place, x, truth, "one device", ":")
        place.set_xticks(x, [str(n) for n in LAST])
        place.margins(x=0.08)
    axes[0].semilogy()
    axes[1].set_ylim(0)
    axes[2].set_ylim(0, 103)


_X = "examples on the last of 8 devices"
PANELS = (
    f"gradient against one device, error | {_X} | ",
    f"training loss at the end (nats) | {_X} | ",
    f"test accuracy (%) | {_X} | ",
)
EXPERIMENT = Experiment(
    measure, verdict, draw, PANELS, shape=(1, 3), size=(10.5, 3.1)
)
