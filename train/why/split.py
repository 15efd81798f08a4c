"""The same net on the same examples, on devices that hold unequal shares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from jaxbn.linen import BatchNorm
from train.why import data, draw, finding
from train.why.finding import Finding, Settings

CLAIM = (
    "A batch has one mean and one variance, however its examples lie on "
    "devices. A mean of the devices' means is another number as soon as their "
    "shares differ, and no number once one of them is empty."
)

DEVICES = 8
EACH = 8  # places on a device
LAST = (8, 4, 2, 1, 0)  # examples on the last device; the others are full
WAYS = {"flax": nn.BatchNorm, "jaxbn": BatchNorm}
COLORS = {"flax": finding.WITHOUT, "jaxbn": finding.WITH}

_RATE = 0.1
_MOMENTUM = 0.9
_LOOK = 20  # steps at the end whose loss is averaged


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
    """Of one way, one share and one seed."""

    gradient: Any  # tree, of the first step
    losses: jax.Array  # (T,) of the step's batch, in nats
    accuracy: jax.Array  # () on test images, with running statistics


def run(settings: Settings) -> Finding:
    """Trains with flax's layer and with jaxbn's on eight devices.

    Seven of them hold eight examples each, the last one eight to none. The
    truth is the same net on the same examples on one device.
    """
    found = data.load(settings)
    steps = 60 if settings.quick else 300
    places = data.places_by_seed(
        len(found.train_y),
        batch_size=DEVICES * EACH,
        steps=steps,
        seeds=settings.seeds,
    )
    keys = jax.vmap(jax.random.key)(np.asarray(settings.seeds))
    arrays = (found.train_x, found.train_y), (found.test_x, found.test_y)
    numbers: dict[str, Any] = {
        "chance": 1 / found.num_classes,
        "examples_on_last": np.array(LAST),
    }
    of = functools.partial(
        train_all, keys, *arrays, places, num_classes=found.num_classes
    )
    truth = [of(way="jaxbn", last=last, together=True) for last in LAST]
    for way in WAYS:
        got = [of(way=way, last=last) for last in LAST]
        numbers[way] = _numbers(got, truth)
    numbers["one device"] = _numbers(truth, truth)
    numbers["holds"] = np.all(
        numbers["jaxbn"]["gradient_error"] < 1e-4, axis=1
    ) & np.isnan(numbers["flax"]["loss"][:, LAST.index(0)])
    return Finding(
        name="split",
        title="One uneven shard",
        claim=CLAIM,
        published=(
            "The layer flax.linen.BatchNorm takes the mean over devices of each device's "
            "mean and mean square (flax 0.12, normalization.py, "
            "_compute_stats). PyTorch's SyncBatchNorm gathers counts along "
            "with them, and takes no mask."
        ),
        measured=_words(numbers),
        numbers=numbers,
        draw=functools.partial(_draw, numbers),
    )


def _numbers(got: list[Trained], truth: list[Trained]) -> dict[str, Any]:
    """Arrays (S, shares), a row a seed."""
    return {
        "gradient_error": np.stack(
            [
                relative_error(a.gradient, b.gradient)
                for a, b in zip(got, truth)
            ],
            1,
        ),
        "loss": np.stack([a.losses[:, -_LOOK:].mean(1) for a in got], 1),
        "test_accuracy": np.stack([a.accuracy for a in got], 1),
    }


def relative_error(got: Any, want: Any) -> np.ndarray:
    """|got - want| / |want| of trees with a leading axis S: (S,)."""

    def norms(tree: Any) -> jax.Array:
        return jax.vmap(optax.tree.norm)(tree)

    return norms(jax.tree.map(jnp.subtract, got, want)) / norms(want)


@functools.partial(
    jax.jit, static_argnames=("way", "last", "together", "num_classes")
)
def train_all(
    keys: jax.Array,
    train: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array],
    places: jax.Array,
    *,
    way: str,
    last: int,
    num_classes: int,
    together: bool = False,
) -> Trained:
    """Trains a net for every seed.

    Args:
      keys: (S,) random.
      train, test: all x and all labels.
      places: (S, T, devices * n), which examples the devices would hold.
      way: one of WAYS.
      last: examples that the last device holds; its other places are padding.
      num_classes: of the labels.
      together: whether the examples lie on one device instead, unpadded.

    Returns:
      Trained, with a leading axis S.
    """
    size = (DEVICES - 1) * EACH + last
    shape = (1, size) if together else (DEVICES, EACH)
    places = places[:, :, : size if together else DEVICES * EACH]
    where = None
    if not together:
        where = (jnp.arange(DEVICES * EACH) < size).reshape(shape)
    net = Net(functools.partial(WAYS[way], axis_name="devices"), num_classes)
    alone = Net(WAYS[way], num_classes)

    def forward(params, batch_stats, x, where):
        def device(x, where):
            return net.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                where=None if where is None else where[:, None],
                mutable=["batch_stats"],
            )

        logits, new = jax.vmap(device, axis_name="devices")(x, where)
        return logits, jax.tree.map(lambda a: a[0], new["batch_stats"])

    def loss(params, batch_stats, index):
        x, labels = (a[index].reshape(*shape, *a.shape[1:]) for a in train)
        if where is not None:
            # What pads a batch is nobody's example.
            x = jnp.where(where[..., None], x, 0)
        logits, new = forward(params, batch_stats, x, where)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        kept = each if where is None else jnp.where(where, each, 0)
        return kept.sum() / size, new

    def step(carry, index):
        params, batch_stats = carry
        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, batch_stats, index
        )
        params = jax.tree.map(lambda p, g: p - _RATE * g, params, gradient)
        return (params, new), value

    def one(key, places):
        start = alone.init(key, train[0][:2], train=False)
        start = start["params"], start["batch_stats"]
        gradient, _ = jax.grad(loss, has_aux=True)(*start, places[0])
        (params, batch_stats), losses = jax.lax.scan(step, start, places)
        logits = alone.apply(
            {"params": params, "batch_stats": batch_stats}, test[0], train=False
        )
        right = logits.argmax(-1) == test[1]
        right &= jnp.isfinite(logits).all(-1)  # else nothing was told
        return Trained(gradient, losses, right.mean())

    return jax.vmap(one)(keys, places)


def _words(numbers: dict[str, Any]) -> str:
    flax, jaxbn = numbers["flax"], numbers["jaxbn"]
    span = finding.span
    one = LAST.index(1)
    even = flax["gradient_error"][:, 0]
    return (
        "against the same examples on one device, the gradient of the first "
        f"step is off by {span(flax['gradient_error'][:, one], spec='.2f')} "
        "of itself with flax where the last of eight devices holds one "
        f"example ({finding.number(even.max())} with even shares), "
        f"{finding.number(jaxbn['gradient_error'].max())} at most with jaxbn. "
        "Where it holds none, flax's loss is "
        f"{'NaN' if np.isnan(flax['loss'][:, -1]).all() else 'a number'} and "
        "its test accuracy "
        f"{span(flax['test_accuracy'][:, -1], spec='.2f')}, jaxbn's "
        f"{span(jaxbn['test_accuracy'][:, -1], spec='.2f')}, as "
        f"{span(numbers['one device']['test_accuracy'][:, -1], spec='.2f')} "
        "on one device. An uneven shard alone does not show in the accuracy "
        f"here: {draw.tally(numbers['holds'])} have jaxbn exact and flax lost."
    )


def _draw(numbers: dict[str, Any], figure: Figure) -> None:
    figure.set_size_inches(10.5, 3.1)
    axes = figure.subplots(1, 3)
    place = np.arange(len(LAST))
    for way, color in COLORS.items():
        found = numbers[way]
        for axis, key, factor in (
            (axes[0], "gradient_error", 1),
            (axes[1], "loss", 1),
            (axes[2], "test_accuracy", 100),
        ):
            values = factor * found[key]
            draw.band(axis, place, values, color=color, label=way)
            axis.plot(place, values.mean(0), "o", color=color, markersize=4)
            lost = np.isnan(values).any(0)
            if lost.any():
                axis.plot(
                    place[lost],
                    [0.95] * lost.sum(),
                    "x",
                    color=color,
                    transform=axis.get_xaxis_transform(),
                    markeredgewidth=2,
                )
                axis.text(
                    place[lost][0],
                    0.88,
                    "NaN",
                    color=color,
                    ha="center",
                    va="top",
                    fontweight="bold",
                    transform=axis.get_xaxis_transform(),
                )
    for axis in axes[1:]:
        key = "loss" if axis is axes[1] else "test_accuracy"
        factor = 1 if axis is axes[1] else 100
        values = factor * numbers["one device"][key].mean(0)
        axis.plot(
            place, values, ":", color=finding.THEORY, label="one device", lw=1.2
        )
    axes[0].set(yscale="log", title="gradient against one device, error")
    axes[1].set(title="training loss at the end (nats)", ylim=(0, None))
    axes[2].set(title="test accuracy (%)", ylim=(0, 103))
    for axis in axes:
        axis.set_xticks(place, [str(n) for n in LAST])
        axis.set_xlabel("examples on the last of 8 devices")
        axis.margins(x=0.08)
    axes[2].legend(loc="center left")
