"""One batch on devices that hold unequal shares of it."""

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
from train.why import plots
from train.why.arms import WITH, WITHOUT, Arm
from train.why.data import Data, Setting, Settings
from train.why.experiment import Experiment, say

DEVICES = 8
EACH = 8  # places on a device
LAST = (8, 4, 2, 1, 0)  # examples on the last device; the others are full
ARMS = {
    "flax": Arm("flax", WITHOUT.color, options={"norm": nn.BatchNorm}),
    "jaxbn": Arm("jaxbn", WITH.color, options={"norm": BatchNorm}),
}

_RATE = 0.1
_MOMENTUM = 0.9
_LAST_STEPS = 20  # steps at the end whose loss is averaged


class Net(nn.Module):
    """Three hidden layers of 64 units with batch norm."""

    norm: Callable[..., nn.Module]
    num_classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, where: jax.Array | None = None
    ) -> jax.Array:
        for _ in range(3):
            x = nn.Dense(64, use_bias=False)(x)
            norm = self.norm(use_running_average=not train, momentum=_MOMENTUM)
            x = nn.relu(norm(x, mask=where))
        return nn.Dense(self.num_classes)(x)


class Trained(NamedTuple):
    """Of one arm, one share and one seed."""

    gradient: Any  # tree, of the first step
    losses: jax.Array  # (T,) of the step's batch, in nats
    accuracy: jax.Array  # () on test images, with running statistics


def measure(settings: Settings, data: Data) -> dict[str, Any]:
    """Trains with flax's layer and with jaxbn's on eight devices.

    Seven of them hold eight examples each, the last one eight to none. The
    truth is the same net on the same examples on one device.
    """
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
    """Arrays (S, shares), a row a seed."""
    errors = [
        relative_error(a.gradient, b.gradient) for a, b in zip(got, truth)
    ]
    return {
        "gradient_error": np.stack(errors, 1),
        "loss": np.stack([a.losses[:, -_LAST_STEPS:].mean(1) for a in got], 1),
        "test_accuracy": np.stack([a.accuracy for a in got], 1),
    }


def relative_error(got: Any, want: Any) -> np.ndarray:
    """|got - want| / |want| of trees with a leading axis S: (S,)."""

    def norms(tree: Any) -> jax.Array:
        return jax.vmap(optax.tree.norm)(tree)

    return norms(jax.tree.map(jnp.subtract, got, want)) / norms(want)


@functools.partial(
    jax.jit, static_argnames=("norm", "last", "together", "num_classes")
)
def train_all(
    setting: Setting,
    *,
    norm: Callable[..., nn.Module],
    last: int,
    num_classes: int,
    together: bool = False,
) -> Trained:
    """Trains a net for every seed, the leading axis of what it returns.

    Args:
      setting: batches of what the devices would hold if all were full.
      norm: class of the layer.
      last: examples that the last device holds; its other places are padding.
      num_classes: of the labels.
      together: whether the examples lie on one device instead, unpadded.
    """
    size = (DEVICES - 1) * EACH + last
    shape = (1, size) if together else (DEVICES, EACH)
    indices = setting.indices[:, :, : size if together else DEVICES * EACH]
    held = jnp.ones(shape, bool)
    if not together:
        held = (jnp.arange(DEVICES * EACH) < size).reshape(shape)
    net = Net(functools.partial(norm, axis_name="devices"), num_classes)
    alone = Net(norm, num_classes)

    def loss(params, batch_stats, index):
        x, labels = (
            a[index].reshape(*shape, *a.shape[1:]) for a in setting.train
        )

        def device(x, held):
            return net.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                where=None if together else held[:, None],
                mutable=["batch_stats"],
            )

        x = x if together else jnp.where(held[..., None], x, 0)
        logits, new = jax.vmap(device, axis_name="devices")(x, held)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        losses = losses if together else jnp.where(held, losses, 0)
        new = jax.tree.map(lambda a: a[0], new["batch_stats"])
        return losses.sum() / size, new

    def step(carry, index):
        params, batch_stats = carry
        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, batch_stats, index
        )
        params = jax.tree.map(lambda p, g: p - _RATE * g, params, gradient)
        return (params, new), value

    def one(key, indices):
        start = alone.init(key, setting.train[0][:2], train=False)
        start = start["params"], start["batch_stats"]
        gradient, _ = jax.grad(loss, has_aux=True)(*start, indices[0])
        (params, batch_stats), losses = jax.lax.scan(step, start, indices)
        state = {"params": params, "batch_stats": batch_stats}
        x, labels = setting.test
        logits = alone.apply(state, x, train=False)
        right = logits.argmax(-1) == labels
        right &= jnp.isfinite(logits).all(-1)  # NaN has no class
        return Trained(gradient, losses, right.mean())

    return jax.vmap(one)(setting.keys, indices)


def verdict(numbers: dict[str, Any]) -> str:
    flax, jaxbn = numbers["flax"], numbers["jaxbn"]
    accuracy = {
        name: numbers[name]["test_accuracy"][:, -1]
        for name in ("flax", "jaxbn", "one device")
    }
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
        accuracy=accuracy,
        holds=numbers["holds"],
    )


def draw(axes: Any, numbers: dict[str, Any]) -> None:
    x = np.arange(len(LAST))
    keys = {"gradient_error": 1, "loss": 1, "test_accuracy": 100}
    for place, (key, unit) in zip(axes, keys.items()):
        for name, arm in ARMS.items():
            values = unit * numbers[name][key]
            plots.band(place, x, values, arm._replace(style="o-"))
            lost = x[np.isnan(values).any(0)]
            where = {"transform": place.get_xaxis_transform()}
            text = {"ha": "center", "color": arm.color, "weight": "bold"}
            for n in lost:
                place.text(n, 0.88, "NaN", va="top", **text, **where)
        if key != "gradient_error":
            truth = unit * numbers["one device"][key].mean(0)
            plots.theory(place, x, truth, "one device", ":")
        place.set_xticks(x, [str(n) for n in LAST])
        place.margins(x=0.08)
    axes[0].semilogy()
    axes[1].set_ylim(0)
    axes[2].set_ylim(0, 103)


_X = "examples on the last of 8 devices"
EXPERIMENT = Experiment(
    "split",
    "One uneven shard",
    claim=(
        "A batch has one mean and one variance, however its examples lie on "
        "devices. A mean of the devices' means is another number as soon as "
        "their shares differ, and no number once one of them is empty."
    ),
    published=(
        "The layer flax.linen.BatchNorm takes the mean over devices of each "
        "device's mean and mean square (flax 0.12, normalization.py, "
        "_compute_stats). PyTorch's SyncBatchNorm gathers counts along with "
        "them, and takes no mask."
    ),
    measure=measure,
    verdict=verdict,
    draw=draw,
    panels=(
        f"gradient against one device, error | {_X} | ",
        f"training loss at the end (nats) | {_X} | ",
        f"test accuracy (%) | {_X} | ",
    ),
    shape=(1, 3),
    size=(10.5, 3.1),
)
