"""Whole training steps of train/, with one norm or another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from configs import defaults
from tests.bench import measure
from train import networks, norms
from train.augment import Augmentation
from train.batching import Batch
from train.optimizer import sgd
from train.pipeline import Feed
from train.programs import make_init_program, make_train_program
from train.recipe import Recipe
from train.topology import Topology

NORMS = ("flax", "jaxbn", "none")
# Fields of the config, and images of a batch on a CPU and on accelerators.
NETS: dict[str, tuple[dict[str, Any], int, int]] = {
    "ResNet-20": ({"model": "resnet", "depth": 20}, 128, 1024),
    "WRN-16-4": ({"model": "wide", "depth": 16, "widen": 4}, 32, 1024),
}


def run(quick: bool, on_cpu: bool, say: Callable[[str], None]) -> dict:
    """Times the step of each network with each norm, interleaved.

    A step is what `python -m train` runs: augmentation, forward, backward and
    update, over all devices; float32 on a CPU, bfloat16 elsewhere.
    """
    rounds, repeat = (3, 1) if quick else (20, 1 if on_cpu else 10)
    dtype = "float32" if on_cpu else "bfloat16"
    result: dict = {"dtype": dtype, "devices": jax.device_count(), "rows": {}}
    for name, (fields, small, large) in NETS.items():
        size = 8 * jax.device_count() if quick else small if on_cpu else large
        calls = {}
        for norm in NORMS:
            say(f"training: {name}, {norm}")
            calls[norm] = _Steps(fields, norm, dtype, size)
        seconds = measure.interleaved(calls, rounds=rounds, repeat=repeat)
        result["rows"][name] = {
            "batch": size,
            "images/s": {
                n: measure.spread(size / t) for n, t in seconds.items()
            },
            "speed": {
                n: measure.spread(seconds["flax"] / t)
                for n, t in seconds.items()
            },
        }
    return result


class _Steps:
    """Takes one step at each call, from where the last one ended."""

    def __init__(self, fields: dict, norm: str, dtype: str, size: int):
        config = defaults.get_config()
        config.update(fields, norm=norm, dtype=dtype)
        auto = (AxisType.Auto,)
        topology = Topology(
            jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
        )
        recipe = Recipe(
            model=networks.make(
                config,
                num_classes=10,
                norm=norms.make_norm(config, topology),
                dtype=jnp.dtype(dtype),
            ),
            optimizer=sgd(
                lambda step: 0.01,
                momentum=0.9,
                nesterov=True,
                weight_decay=5e-4,
            ),
            pixel_mean=(128.0,) * 3,
            pixel_std=(64.0,) * 3,
            augmentation=Augmentation(padding=4, flip="random"),
        )
        rng = np.random.default_rng(0)
        batch = Batch(
            rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
            rng.integers(0, 10, size, np.int32),
            np.arange(size, dtype=np.int32),
            np.ones(size, bool),
        )
        self._feed = Feed(None, topology.put(batch, size), np.int32(0))
        self._step = make_train_program(
            recipe, topology, self._feed, num_batches=1
        )
        init = make_init_program(recipe, topology)
        self._state = init(batch.images[:1], 0)

    def __call__(self) -> Any:
        self._state, sums = self._step(self._state, self._feed, 0, 0)
        return sums
