"""Checks that a model does not depend on how its batch is split."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._axis_names import all_names
from jaxbn.testing._blame import blame
from jaxbn.testing._evaluate import Split, evaluate
from jaxbn.testing._float64 import narrowest
from jaxbn.testing._model import as_function
from jaxbn.testing._recheck import Recheck, differences, matters


def assert_shard_invariant(
    apply_fn: Any,
    variables: Any,
    batch: Any,
    *,
    call: Callable[[Any, Any, bool], Any] | None = None,
    rngs: Any = None,
    mutable: Sequence[str] = (),
    axis_name: Hashable | tuple[Hashable, ...] = "data",
    devices: Sequence[int] | None = None,
    rtol: float | None = None,
    check_vma: bool = True,
    seed: int = 0,
) -> None:
    """Asserts that a model does not depend on how its batch is split.

    For every split, runs the model in `jax.shard_map` and compares it with one
    device: outputs, new variables, and the gradients of sum(outputs *
    cotangent) with respect to variables and batch, with a normally distributed
    cotangent. Variables are replicated. The copies on all devices are compared,
    even of arrays that should be equal on all of them.

    The error of an array is |got - want| / |want| in the Euclidean norm, where
    |want| is at least a tenth of the largest among outputs, new variables,
    gradients of variables or gradients of the batch: the gradient of a bias
    before a normalization, for example, is nothing but rounding.

    Arrays that differ by more than rtol are recomputed in float64, whatever the
    dtypes of the model, on the inputs and close to them. Gradients that agree
    there differed by rounding, or at a kink: at a zero before a ReLU a rounding
    difference can flip a gradient. This is a warning, not an error. If rounding
    changes outputs or new variables by more than rtol, the error says so.

    Args:
      apply_fn: (variables, batch) -> (outputs, new variables), such as lambda
        v, b: model.apply(v, b["x"], train=True, mutable=["batch_stats"]),
        without anything random that depends on the device, such as dropout. Or
        a flax.linen or flax.nnx model, which is called in training mode.
      variables: pytree of arrays; variables of a linen model, None for nnx.
      batch: pytree of arrays with the examples on axis 0. If there is a mask,
        put it here; an uneven one distinguishes the mean of all values from a
        mean of means.
      call: (model, batch, train) -> output, for a model, called with
        train=True. None passes the batch to the model, and the mode to the
        argument or field that takes it, such as train or deterministic. A linen
        model is bound, as for `method` in flax.
      rngs: for linen, a key or a dict of keys. None creates a key for every
        stream.
      mutable: for linen, names of collections that the call creates.
      axis_name: name of the mesh axis; for a tuple of names, every
        factorization of the devices is tested.
      devices: numbers of devices; None tests all divisors of the number of
        local devices that divide the batch.
      rtol: error allowed. None is sqrt(eps) / 3 of the least precise float in
        the program: 1e-4 for float32, 1e-2 for float16, 3e-2 for bfloat16.
      check_vma: as in `jax.shard_map`; use the same value as in training.
      seed: seed of the cotangent.

    Raises:
      AssertionError: a split differs; names the first layer that does, or else
        the array, the split and the error. Layers of flax.linen are known by
        path, others by the order in which their mean and var are computed.
      ValueError: the batch cannot be split, apply_fn does not return a pair,
        the result on one device is not finite, or the model cannot be called
        without `call`.
    """
    apply_fn, variables = as_function(
        apply_fn, variables, call=call, rngs=rngs, mutable=mutable
    )
    names = all_names(axis_name)
    splits = _splits(batch, devices, len(names))
    inputs = jax.device_get((variables, batch))

    def split_into(sizes: tuple[int, ...]) -> Split:
        return Split(apply_fn, inputs, names, sizes, check_vma, [])

    one = evaluate(split_into((1,) * len(names)), seed, None)
    for a in one.arrays:
        if a.role != "layer" and not np.isfinite(a.copies).all():
            raise ValueError(f"{a} is not finite on one device.")
    if rtol is None:
        # A third of the digits: more than the rounding error.
        rtol = math.sqrt(float(jnp.finfo(narrowest(one.program)).eps)) / 3
    recheck = Recheck(one, inputs, rtol)
    for sizes in splits:
        split = split_into(sizes)
        got = evaluate(split, seed, one.arrays)
        wrong = differences(got.arrays, one.arrays, rtol)
        if not matters(got.arrays, wrong):
            continue
        where = f"on {' x '.join(map(str, sizes))} devices"
        wrong, note = recheck(got, wrong)
        if not wrong:
            warnings.warn(f"{where.capitalize()} {note}", stacklevel=2)
            continue
        first = blame(
            split,
            got.arrays,
            [(got.arrays[i], e) for i, e in wrong.items()],
            rtol,
        )
        raise AssertionError(
            f"{first.what} differs {where}: relative error {first.error:.2g} "
            f"(allowed {rtol:.0e}). {note or first.why}"
        )


def _splits(
    batch: Any, devices: Sequence[int] | None, axes: int
) -> list[tuple[int, ...]]:
    """Returns the mesh shapes to try, the fewest devices first."""
    shapes = [np.shape(a) for a in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"batch needs one length on axis 0; got {shapes}.")
    examples, most = shapes[0][0], jax.local_device_count()
    counts = devices or [n for n in range(1, most + 1) if most % n == 0]
    fit = [n for n in counts if n <= most and examples % n == 0]
    if max(fit, default=1) == 1 or (devices and len(fit) < len(devices)):
        raise ValueError(
            f"{examples} examples cannot be split over {list(counts)} of "
            f"{most} devices. jax.config.update('jax_num_cpu_devices', 8) at "
            "the start of a program simulates eight."
        )
    return [shape for n in sorted(fit) for shape in _factorizations(n, axes)]


def _factorizations(n: int, axes: int) -> list[tuple[int, ...]]:
    if axes == 1:
        return [(n,)]
    factors = [d for d in range(1, n + 1) if n % d == 0]
    return [(d, *r) for d in factors for r in _factorizations(n // d, axes - 1)]
