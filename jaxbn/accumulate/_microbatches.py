"""Value and gradient of each microbatch, and their means."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._checks import describe
from jaxbn._compat import vary_over, varying_axes
from jaxbn._moments import merge
from jaxbn._passes import Moments
from jaxbn.accumulate._loop import Inputs
from jaxbn.accumulate._run import evaluate
from jaxbn.accumulate._trace import trace


def means(
    fn: Callable[..., tuple[Any, Any]], inputs: Inputs
) -> tuple[Any, Any]:
    """Returns (means over the microbatches, aux).

    Args:
      fn: inputs of one microbatch -> (tree to average, aux).
      inputs: inputs of all microbatches; if their axis has a name, fn must use
        it.
    """
    program, tree = trace(fn, inputs)
    name = inputs.axis_name
    if name is not None and not any(n.collective for n in program.nodes):
        raise ValueError(
            f"loss does nothing over axis_name={name!r}, so no layer "
            "normalizes with the statistics of all microbatches. Give the "
            f"layers axis_name={name!r}, under shard_map a tuple with the mesh "
            "axis, or use exact=False."
        )
    to_mean, aux = jax.tree.unflatten(tree, program.outputs)
    to_mean = jax.tree.map(program.add_mean, to_mean)
    program.outputs = jax.tree.leaves((to_mean, aux))
    out = evaluate(program, inputs.values)
    found, values = jax.tree.unflatten(tree, out)
    differs = jax.tree.map(program.stacked.__getitem__, aux)
    return found, _merge_moments(values, differs, inputs.size)


def _merge_moments(aux: Any, differs: Any, size: int) -> Any:
    """Merges the Moments that differ between microbatches."""

    def merged(found: Any, differs: Any) -> Any:
        if not _is_moments(found) or not any(differs):
            return found
        fields = [
            field if own else jnp.broadcast_to(field, (size, *field.shape))
            for field, own in zip(found, differs)
        ]
        return merge(*(Moments(*row) for row in zip(*fields)))

    return jax.tree.map(merged, aux, differs, is_leaf=_is_moments)


def _is_moments(tree: Any) -> bool:
    return isinstance(tree, Moments)


def gradient_of_one(
    loss: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    axis: set[Hashable],
) -> Callable[..., Any]:
    """Returns a function to ((value, gradient), aux) of a microbatch.

    The value is marked as varying over axis, if types say that: a value that
    all microbatches share then counts once in each, as it does without such
    types.
    """

    def scalar(*args: Any) -> Any:
        value, aux = loss(*args) if has_aux else (loss(*args), None)
        if isinstance(value, tuple):
            raise ValueError(
                f"loss returned a tuple of {len(value)} in place of one value. "
                "With has_aux=True it returns (value, aux)."
            )
        return vary_over(jnp.asarray(value), axis), aux

    def both(*args: Any) -> Any:
        (value, aux), grads = jax.value_and_grad(scalar, argnums, has_aux=True)(
            *args
        )
        # A sum over microbatches in bfloat16 would lose the last ones.
        return (value, jax.tree.map(_widen, grads)), aux

    return both


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def is_array(x: Any) -> bool:
    """Returns whether jax.grad traces x; Python values reach loss as such."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def split(batch: Any, microbatches: int) -> Any:
    """Splits axis 0 of each leaf, with the microbatches on axis 1."""
    if not isinstance(microbatches, int | np.integer):
        raise ValueError(
            f"microbatches must be an integer; got {microbatches}."
        )
    leaves = jax.tree.leaves(batch)
    words = ", ".join(
        describe(leaf) if is_array(leaf) else type(leaf).__name__
        for leaf in leaves[:8]
    ) + (", ..." if leaves[8:] else "")
    if not leaves or not all(is_array(x) and x.ndim for x in leaves):
        raise ValueError(
            "Every leaf of the batch, the last argument, must be an array with "
            f"the examples on axis 0; got {words or 'no leaf'}."
        )
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            f"The leaves of the batch differ in length on axis 0; got {words}."
        )
    (size,) = sizes
    if microbatches < 1 or size < 1 or size % microbatches:
        fits = [n for n in range(1, size + 1) if size % n == 0]
        near = [n for n in fits if n < microbatches][-1:]
        near += [n for n in fits if n > microbatches][:1]
        raise ValueError(
            f"microbatches={microbatches} does not divide the {size} examples "
            f"of the batch; {' and '.join(map(str, near)) or 'nothing'} would."
        )
    return jax.tree.map(
        lambda x: x.reshape(-1, microbatches, *x.shape[1:]), batch
    )


def vary_some(
    args: Sequence[Any], nums: Sequence[int], over: set[Hashable]
) -> list[Any]:
    """Marks the arguments in nums as varying over mesh axes."""
    return [
        jax.tree.map(lambda x: vary_over(x, over), arg) if n in nums else arg
        for n, arg in enumerate(args)
    ]


def gradient_like(grad: jax.Array, param: jax.Array) -> jax.Array:
    """Sums over mesh axes that param does not vary over, as jax.grad does."""
    over = tuple(varying_axes(grad) - varying_axes(param))
    total = jax.lax.psum(grad, over) if over else grad
    return total.astype(param.dtype)
