"""Whether a model depends on how its batch is split over devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxbn.testing._leaves import path_name, widest, without_keys
from jaxbn.testing._model import as_function


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

    Compares with one device, for every split under `jax.shard_map`: outputs,
    new variables, and the gradients of sum(outputs * cotangent) with respect
    to variables and batch, with a normally distributed cotangent. Variables
    are replicated. Every device's copy is read, also of what should be equal
    on all. On failure a second run records the layers of flax.linen.

    The error of an array is |got - want| / |want| in the Euclidean norm, where
    |want| counts as no less than a tenth of the largest among outputs, new
    variables, gradients of variables or gradients of the batch: in front of a
    normalization the gradient of a bias is nothing but rounding. A ReLU that
    flips moves gradients by more than rounding; jax.enable_x64 settles doubt.

    Args:
      apply_fn: (variables, batch) -> (outputs, new variables), such as
        lambda v, b: model.apply(v, b["x"], train=True, mutable=["batch_stats"])
        without anything random that depends on the device, such as dropout. Or
        a model of flax.linen or flax.nnx, which is called in training mode.
      variables: pytree of arrays; of a linen model its variables, of an nnx
        model None.
      batch: pytree of arrays, the examples on axis 0. A mask belongs here; an
        uneven one tells a mean of means from a mean.
      call: (model, batch, train) -> output for a model, called with train=True.
        None gives it the batch, and its mode by the argument or field that has
        it, such as train or deterministic. A linen model is bound, as it is for
        `method` of flax.
      rngs: of a linen model: a key, or a dict of them. None makes one for
        every stream.
      mutable: of a linen model: names of collections that the call creates.
      axis_name: of the mesh axis; of several, every factorization is tried.
      devices: numbers of devices; None takes all divisors of the number of
        local devices that divide the batch.
      rtol: error allowed; None takes sqrt(eps) / 3 of the narrowest float in
        the program: float32 1e-4, float16 1e-2, bfloat16 3e-2.
      check_vma: as in `jax.shard_map`; give what you train with.
      seed: of the cotangent.

    Raises:
      AssertionError: names the first layer that differs, or else the array,
        the split and the error.
      ValueError: the batch cannot be split, apply_fn returns no pair, the
        result on one device is not finite, or see `jaxbn.doctor.examine` for
        the call of a model.
    """
    apply_fn, variables = as_function(
        apply_fn, variables, call=call, rngs=rngs, mutable=mutable
    )
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    splits = _splits(batch, devices, len(names))
    inputs = jax.device_get((variables, batch))
    evaluate = functools.partial(
        _evaluate, apply_fn, inputs, names, check_vma, seed
    )
    want, program = evaluate((1,) * len(names), None)
    largest: dict[str, float] = {}
    for a in want:
        if a.role != "layer" and not np.isfinite(a.copies).all():
            raise ValueError(f"{a} is not finite on one device.")
        size = float(np.linalg.norm(a.copies))
        largest[a.role] = max(largest.get(a.role, 0), size)
    if rtol is None:
        used = [rtol for name, rtol in _RTOL.items() if f":{name}[" in program]
        rtol = max(used, default=_RTOL["f32"])
    for split in splits:
        got, _ = evaluate(split, want)
        wrong = []
        for a, true in zip(got, want):
            floor = 0 if a.role == "layer" else largest[a.role] / 10
            error = _error(a.copies, true.copies[0], floor)
            if error > rtol:
                wrong.append((a, error))
        if any(a.role != "layer" for a, _ in wrong):
            first, error, why = _first(got, wrong, names, rtol)
            raise AssertionError(
                f"{first} differs on {' x '.join(map(str, split))} devices: "
                f"relative error {error:.2g} (allowed {rtol:.0e}). {why}"
            )


_ROLES = ("new variable", "output", "gradient of variable", "gradient of batch")
_RTOL = {"f64": 5e-9, "f32": 1e-4, "f16": 1e-2, "bf16": 3e-2}


class _Array(NamedTuple):
    role: str  # "layer", or one of _ROLES
    path: str
    copies: Any  # (1 or devices, *shape on the whole batch)
    unbound: bool = False  # a layer whose axis_name is None

    def __str__(self) -> str:
        return f"{self.role} {self.path!r}" if self.path else f"the {self.role}"

    def owns(self, a: _Array) -> bool:
        """Whether a is a variable of this layer, or of one inside it."""
        inner = a.path.partition("/")[2]  # without its collection
        mine = not self.path or inner.startswith(f"{self.path}/")
        return mine and a.role == "new variable"


def _splits(
    batch: Any, devices: Sequence[int] | None, axes: int
) -> list[tuple[int, ...]]:
    """Mesh shapes to try, the fewest devices first."""
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


def _evaluate(
    apply_fn: Callable[[Any, Any], tuple[Any, Any]],
    inputs: tuple[Any, Any],
    names: tuple[Hashable, ...],
    check_vma: bool,
    seed: int,
    split: tuple[int, ...],
    like: list[_Array] | None,
) -> tuple[list[_Array], str]:
    """Returns all results, joined to look like the given ones, and the jaxpr.

    The gradient is taken outside shard_map, of a loss over what all devices
    return: JAX then knows how each input was shared, whatever check_vma is.
    """
    labels: list[_Array] = []
    layers: list[tuple[str, bool]] = []

    def stacked(*inputs: Any) -> Any:
        results = _record(apply_fn, inputs, layers)
        return jax.tree.map(lambda a: without_keys(a)[None], results)

    devices = np.array(jax.local_devices()[: math.prod(split)])
    sharded = jax.shard_map(
        stacked,
        mesh=Mesh(devices.reshape(split), names),
        in_specs=(P(), P(names)),
        out_specs=P(names),
        check_vma=check_vma,
    )

    def loss(*inputs: Any) -> tuple[jax.Array, list[jax.Array]]:
        outputs, new, taps = sharded(*inputs)
        found = _labelled("output", outputs) + _labelled("new variable", new)
        for (path, unbound), tap in zip(layers, taps):
            found += [_Array("layer", path, a, unbound) for a in tap]
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
        labels[:] = [a._replace(copies=None) for a in found]
        return total, [a.copies for a in found]

    @jax.jit
    def run(variables: Any, batch: Any) -> list[jax.Array]:
        grads, arrays = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(
            variables, batch
        )
        found = _labelled(_ROLES[2], grads[0]) + _labelled(_ROLES[3], grads[1])
        found = [a for a in found if a.copies.dtype != jax.dtypes.float0]
        labels.extend(a._replace(copies=None) for a in found)
        results: list[jax.Array] = arrays + [a.copies[None] for a in found]
        return results

    traced = run.trace(*inputs)
    arrays = traced.lower().compile()(*inputs)
    found = [
        a._replace(copies=widest(array)) for a, array in zip(labels, arrays)
    ]
    return found, str(traced.jaxpr)


def _record(
    apply_fn: Callable[[Any, Any], tuple[Any, Any]],
    inputs: tuple[Any, Any],
    layers: list[tuple[str, bool]],
) -> tuple[Any, Any, list[list[jax.Array]]]:
    """Adds what flax.linen layers return, in the order they finish."""
    from flax import linen as nn

    layers.clear()
    taps, here = [], get_opaque_trace_state(convention="flax")

    def tap(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result, module = call(*args, **kwargs), context.module
        # What is inside a scan or a checkpoint cannot leave it this way.
        outside = here == get_opaque_trace_state(convention="flax")
        if outside and context.method_name == "__call__":
            unbound = getattr(module, "axis_name", "") is None
            layers.append(("/".join(module.path), unbound))
            arrays = jax.tree.leaves(result)
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


def _labelled(role: str, tree: Any) -> list[_Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [_Array(role, path_name(path), a) for path, a in leaves]


def _join(a: _Array, whole: jax.Array) -> jax.Array:
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


def _error(copies: np.ndarray, want: np.ndarray, floor: float = 0.0) -> float:
    """Largest distance of a copy from want, relative to the size of want."""
    distance = max(float(np.linalg.norm(copy - want)) for copy in copies)
    scale = max(float(np.linalg.norm(want)), floor)
    if not distance:
        return 0.0
    return distance / scale if scale and np.isfinite(distance) else np.inf


def _first(
    got: list[_Array],
    wrong: list[tuple[_Array, float]],
    names: tuple[Hashable, ...],
    rtol: float,
) -> tuple[_Array, float, str]:
    """Returns what differs first, by how much, and why."""
    axis = names if len(names) > 1 else names[0]

    def varies(a: _Array) -> bool:
        return _error(a.copies, a.copies[0]) > rtol

    for layer in (a for a in got if a.role == "layer"):
        own = [(a, e) for a, e in wrong if layer.owns(a)]
        errors = [e for a, e in wrong if a is layer] + [e for _, e in own]
        if not errors:
            continue
        if layer.unbound or any(varies(a) for a, _ in own):
            why = (
                f"Its statistics are not synchronized over {axis!r}: set "
                f"axis_name={axis!r}."
            )
        elif own:
            why = (
                "Its statistics are the same on every device, but not those "
                "of the whole batch. A mean of the devices' means forgets how "
                "many values each has kept."
            )
        else:
            why = "Its result depends on how the batch is split."
        return layer, max(errors), why
    first, error = min(
        wrong,
        key=lambda pair: (not varies(pair[0]), _ROLES.index(pair[0].role)),
    )
    why = "Every device has the same, but not that of the whole batch."
    if varies(first):
        why = f"It is not the same on all devices along {axis!r}."
    elif first.role in _ROLES[2:]:
        why = "Outputs agree: a derivative does not reach the other devices."
    return first, error, why
