"""A model's outputs, new variables and gradients on a split of its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxbn._compat.jaxprs import trace_state
from jaxbn.testing._leaves import path_name, widest, without_keys

ROLES = ("new variable", "output", "gradient of variable", "gradient of batch")


class Array(NamedTuple):
    """One result, of each device or of all."""

    role: str  # "layer", or one of ROLES
    path: str
    copies: Any  # (1 or devices, *shape on the whole batch)
    call: int | None = None  # of a layer, as an index
    is_real: bool = True  # not an integer, as in counters and random keys

    def __str__(self) -> str:
        return f"{self.role} {self.path!r}" if self.path else f"the {self.role}"


class Call(NamedTuple):
    """A layer of flax.linen that was called."""

    path: str
    unbound: bool  # has batch statistics, and axis_name=None
    inside: bool  # of a scan or a checkpoint: its result stays there


class Split(NamedTuple):
    """A model to be run on several devices."""

    apply_fn: Callable[[Any, Any], tuple[Any, Any]]
    inputs: tuple[Any, Any]
    names: tuple[Hashable, ...]  # of the mesh axes
    sizes: tuple[int, ...]
    check_vma: bool
    calls: list[Call]  # filled in the order in which the layers finish

    def __call__(self, *inputs: Any) -> tuple[Any, Any, list[list[jax.Array]]]:
        """Returns outputs, new variables and what the layers return.

        Axis 0 counts devices.
        """
        devices = np.array(jax.local_devices()[: math.prod(self.sizes)])

        def stacked(*inputs: Any) -> Any:
            results = _record(self.apply_fn, inputs, self.calls)
            return jax.tree.map(lambda a: without_keys(a)[None], results)

        sharded = jax.shard_map(
            stacked,
            mesh=Mesh(devices.reshape(self.sizes), self.names),
            in_specs=(P(), P(self.names)),
            out_specs=P(self.names),
            check_vma=self.check_vma,
        )
        found: tuple[Any, Any, list[list[jax.Array]]] = sharded(*inputs)
        return found


class Results(NamedTuple):
    """What a split of the batch gives."""

    arrays: list[Array]
    program: Any  # the closed jaxpr that computes their copies

    def replaced(self, copies: Any) -> list[Array]:
        return [
            a._replace(copies=widest(copy))
            for a, copy in zip(self.arrays, copies)
        ]


def evaluate(split: Split, seed: int, like: list[Array] | None) -> Results:
    """Returns all results, joined to look like the given ones.

    The gradient is taken outside shard_map, of a loss over what all devices
    return: JAX then knows how each input was shared, whatever check_vma is.
    """
    labels: list[Array] = []

    def loss(*inputs: Any) -> tuple[jax.Array, list[jax.Array]]:
        outputs, new, taps = split(*inputs)
        found = _labelled("output", outputs) + _labelled("new variable", new)
        for i, (layer, tap) in enumerate(zip(split.calls, taps)):
            found += [Array("layer", layer.path, a, i) for a in tap]
        # A stream that no user's data comes from: through a normalization a
        # cotangent proportional to the input has no gradient at all.
        rng, total = np.random.default_rng((seed, len("jaxbn"))), jnp.zeros(())
        for i, a in enumerate(found):
            a = a._replace(copies=_join(a, (like[i] if like else a).copies))
            found[i] = a
            if a.role == "output" and jnp.issubdtype(
                a.copies.dtype, jnp.floating
            ):
                # The mean: what devices share counts once.
                value = a.copies.mean(0)
                total += (value * rng.normal(size=value.shape)).sum()
        labels[:] = [
            a._replace(
                copies=None,
                is_real=jnp.issubdtype(a.copies.dtype, jnp.inexact),
            )
            for a in found
        ]
        return total, [a.copies for a in found]

    @jax.jit
    def run(variables: Any, batch: Any) -> list[jax.Array]:
        grads, arrays = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(
            variables, batch
        )
        found = _labelled(ROLES[2], grads[0]) + _labelled(ROLES[3], grads[1])
        found = [a for a in found if a.copies.dtype != jax.dtypes.float0]
        labels.extend(a._replace(copies=None) for a in found)
        results: list[jax.Array] = arrays + [a.copies[None] for a in found]
        return results

    traced = run.trace(*split.inputs)
    copies = traced.lower().compile()(*split.inputs)
    results = Results(labels, traced.jaxpr)
    return results._replace(arrays=results.replaced(copies))


def _record(
    apply_fn: Callable[[Any, Any], tuple[Any, Any]],
    inputs: tuple[Any, Any],
    calls: list[Call],
) -> tuple[Any, Any, list[list[jax.Array]]]:
    """Adds what flax.linen layers return, in the order they finish."""
    from flax import linen as nn

    calls.clear()
    taps, here = [], trace_state()

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result, module = call(*args, **kwargs), context.module
        if context.method_name == "__call__":
            unbound = getattr(module, "axis_name", "") is None
            unbound = unbound and "batch_stats" in module.variables
            inside = here != trace_state()
            calls.append(Call("/".join(module.path), unbound, inside))
            arrays = [] if inside else jax.tree.leaves(result)
            taps.append([a for a in arrays if isinstance(a, jax.Array)])
        return result

    with nn.intercept_methods(tap):
        pair = apply_fn(*inputs)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(
            "apply_fn must return (outputs, new variables); got "
            f"{jax.tree.map(jnp.shape, pair)}."
        )
    return *pair, taps


def _labelled(role: str, tree: Any) -> list[Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [Array(role, path_name(path), a) for path, a in leaves]


def _join(a: Array, whole: jax.Array) -> jax.Array:
    """Puts the parts of the devices together; what each has whole stays."""
    copies: jax.Array = a.copies
    if copies.shape[1:] == whole.shape[1:]:
        return copies
    for axis in range(copies.ndim - 1):
        joined = jnp.concatenate(list(copies), axis)[None]
        if joined.shape == whole.shape:
            return joined
    if a.role == "layer":  # the verdict does not need it
        return whole
    raise AssertionError(
        f"{a} has shape {list(a.copies.shape[1:])} on each of several devices "
        f"and {list(whole.shape[1:])} on one: neither split nor shared."
    )


def error(copies: np.ndarray, want: np.ndarray, floor: float = 0.0) -> float:
    """Largest distance of a copy from want, relative to the size of want."""
    distance = max(float(np.linalg.norm(copy - want)) for copy in copies)
    scale = max(float(np.linalg.norm(want)), floor)
    if not distance:
        return 0.0
    return distance / scale if scale and np.isfinite(distance) else np.inf
