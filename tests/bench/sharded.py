"""What the peers compute over eight simulated devices.

Run as a program it prints every number as JSON, so that a benchmark on one
device, or on an accelerator, can take them from a process of their own; `run`
starts it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.testing._collectives import split_conditional
from tests.bench import layers

DEVICES = 8
VALID = (4, 4, 4, 4, 4, 4, 4, 1)
CHANNELS = 4


def over_devices(
    function: Callable, in_specs, out_specs, *, check_vma: bool = True
) -> Callable:
    """Returns function under jit and shard_map over the axis "data"."""
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=kind)
    return jax.jit(
        jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=check_vma,
        )
    )


def rows(valid: tuple[int, ...] = VALID) -> tuple[np.ndarray, np.ndarray]:
    """Returns x (32, C) from N(3, 2) in float32 and its mask (32, 1).

    Of the four rows on each device the mask keeps as many as valid says. The
    first row of the last device is 8, so that its weight shows.
    """
    x = np.random.default_rng(0).normal(3, 2, (4 * DEVICES, CHANNELS))
    x[-4] = 8
    kept = np.arange(4)[None, :] < np.asarray(valid)[:, None]
    return x.astype(np.float32), kept.reshape(-1, 1)


def truth(
    x: np.ndarray, mask: np.ndarray | bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 mean and variance of the kept rows, (C,) each."""
    kept = np.asarray(x, np.float64)[np.broadcast_to(mask, x.shape)[:, 0]]
    return kept.mean(0), kept.var(0)


def train_steps(
    name: str, batches: list[tuple[np.ndarray, np.ndarray]], *, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the running mean and variance after training on the batches.

    Args:
      name: of the peer; its batch norm synchronizes over all devices.
      batches: x (N, C) and mask (N, 1).
      momentum: weight of the old value; 0 leaves the last batch's statistics.
    """
    layer = layers.build(name, CHANNELS, axis_name="data", momentum=momentum)
    params, state = layer.init()

    def one(params, state, x, mask):
        return layer.train(params, state, x, mask)[1]

    shard, whole = P("data"), P()
    step = over_devices(one, (whole, whole, shard, shard), whole)
    for x, mask in batches:
        # Waits every time: many collectives in flight can block each other.
        state = jax.block_until_ready(step(params, state, x, mask))
    mean, var = layer.running(state)
    return np.asarray(mean), np.asarray(var)


def uneven(name: str) -> dict[str, float]:
    """Mean and variance of unequal shards, first feature, and the truth."""
    x, mask = rows()
    mean, var = train_steps(name, [(x, mask)], momentum=0)
    true_mean, true_var = truth(x, mask)
    return {
        "mean": float(mean[0]),
        "var": float(var[0]),
        "true_mean": float(true_mean[0]),
        "true_var": float(true_var[0]),
    }


def after_empty_device(name: str, *, steps: int) -> dict[str, float]:
    """Running statistics after one batch with an empty shard, then clean."""
    x, bad = rows((0, *VALID[1:]))
    clean = x, np.ones_like(bad)
    mean, var = train_steps(name, [(x, bad)] + steps * [clean], momentum=0.9)
    true_mean, true_var = truth(*clean)
    return {
        "mean": float(mean[0]),
        "var": float(var[0]),
        "true_mean": float(true_mean[0]),
        "true_var": float(true_var[0]),
        "steps": steps,
    }


def all_reduces(name: str, *, backward: bool, channels: int = 64) -> list[int]:
    """Returns the number of floats in each all-reduce of the compiled HLO.

    backward adds the derivative by x alone: parameter gradients are summed
    with those of the other layers.
    """
    layer = layers.build(name, channels, axis_name="data")
    params, state = layer.init()

    def step(params, state, x, ct):
        def train(x):
            return layer.train(params, state, x)

        if not backward:
            return train(x)
        y, vjp, state_ = jax.vjp(train, x, has_aux=True)
        return vjp(ct)[0], state_

    shard, whole = P("data"), P()
    f = over_devices(
        step,
        (whole, whole, shard, shard),
        (shard, whole),
        check_vma=layer.check_vma,
    )
    x = np.zeros((4 * DEVICES, channels), np.float32)
    program = f.lower(params, state, x, x).compile().as_text()
    return reduced_sizes(split_conditional(program)[0])


def reduced_sizes(hlo: str) -> list[int]:
    """Returns the values that each all-reduce of an HLO module sums."""
    found = re.findall(r"= ([^=\n]*?) all-reduce(?:-start)?\(", hlo)
    return [
        sum(
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"\w+\[([\d,]*)\]", shape)
        )
        for shape in found
    ]


def shifts(offset: float) -> dict[str, float]:
    """Relative error of the variance of N(offset, 1) over the devices.

    The shift of a module is its running mean: 0 at the first step, after 100 of
    momentum 0.99 about 0.63 of the mean, at last near it. Up to four standard
    deviations from the mean one pass is all there is.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(offset, 1, (512 * DEVICES, CHANNELS)).astype(np.float32)
    true = truth(x)[1]

    def var(x, shift):
        return jaxbn.batch_norm(x, axis_name="data", shift=shift)[1].var

    run = over_devices(var, (P("data"), P()), P())
    at = {
        "jaxbn, first step": 0,
        "jaxbn, step 100": offset * (1 - 0.99**100),
        "jaxbn, shift 0.5 off": offset + 0.5,
        "jaxbn, shift 3.9 off": offset + 3.9,
    }
    found = {}
    for name, shift in at.items():
        got = run(x, np.full(CHANNELS, shift, np.float32))
        found[name] = float(
            np.abs(np.asarray(got, np.float64) / true - 1).max()
        )
    everything = x, np.ones((len(x), 1), bool)
    flax = train_steps(layers.BASE, [everything], momentum=0)
    found[layers.BASE] = float(
        np.abs(np.asarray(flax[1], np.float64) / true - 1).max()
    )
    return found


def drifted() -> dict[str, float]:
    """Variance of replicas whose means drifted: averaged, merged, true."""
    rng = np.random.default_rng(0)
    centres = np.linspace(-2, 2, DEVICES)[:, None, None]
    x = rng.normal(centres, 2, (DEVICES, 256, 1)).astype(np.float32)
    parts = [jaxbn.moments(jnp.asarray(replica)) for replica in x]
    return {
        "averaged": float(np.mean([part.var[0] for part in parts])),
        "merged": float(jaxbn.merge(*parts).var[0]),
        "true": float(x.astype(np.float64).var()),
    }


def everything(names: list[str], *, clean_steps: int) -> dict:
    """Returns all of the above for the named peers."""
    found: dict = {"shifts": {}, "uneven": {}, "empty": {}, "all_reduces": {}}
    for offset in (1e0, 1e2, 1e3, 1e4, 1e5):
        found["shifts"][f"{offset:.0e}"] = shifts(offset)
    for name in names:
        found["all_reduces"][name] = [
            all_reduces(name, backward=backward) for backward in (False, True)
        ]
        if layers.build(name, CHANNELS).masks:
            found["uneven"][name] = uneven(name)
            found["empty"][name] = after_empty_device(name, steps=clean_steps)
    found["drifted"] = drifted()
    return found


def run(names: list[str], *, clean_steps: int) -> dict:
    """Returns `everything` from a process with eight simulated devices.

    Simulated devices want more threads than there are cores, which would
    disturb timings in this process, and an accelerator may be but one device.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        # With fewer threads, collectives can wait for ever.
        "NPROC": str(2 * DEVICES),
    }
    command = [sys.executable, "-m", __name__, str(clean_steps), *names]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    steps, *peers = sys.argv[1:]
    print(json.dumps(everything(peers, clean_steps=int(steps))))
