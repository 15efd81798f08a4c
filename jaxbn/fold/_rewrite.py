"""The folded program: what its parameters are, and how it runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.fold._axes import Axes, Product
from jaxbn.fold._chain import Analysis, Fold, Front
from jaxbn.fold._trace import Op
from jaxbn.fold._walk import Step


class Rewritten:
    """A program with kernels and biases in place of its normalizations.

    Attributes:
      kept: names of the leaves that are needed as they are, by index.
      taken: those, and the names of the kernels.
      signature: equal for two programs that take the same parameters.
    """

    def __init__(self, analysis: Analysis):
        self._program, self._folds = analysis.program, analysis.folds
        self._fronts = {front.leaf: front for front in analysis.fronts}
        self._names = analysis.names
        places: list[Fold | Front] = [*self._folds, *analysis.fronts]
        steps = [step for place in places for step in place.steps]
        only = {step.op: step.data for step in steps}
        self._ops = self._program.live(self._program.outputs, only)
        needed = set(self._program.outputs)
        for op in self._ops:
            needed.update([only[op]] if op in only else op.inputs)
        kernels = {place.leaf for place in places}
        self.kept = {
            i: self._names[i]
            for i, v in enumerate(self._program.leaves)
            if v in needed and i not in kernels
        }
        self.taken = {*self.kept.values(), *(self._names[i] for i in kernels)}
        # Products that share a kernel share its bias.
        self._kernels = {fold.leaf: fold for fold in self._folds}
        self._biases: dict[int, str] = {}
        for leaf in {**self._kernels, **self._fronts}:
            taken = {*self.kept.values(), *self._biases.values()}
            self._biases[leaf] = _bias_name(self._names[leaf], taken)
        self.signature = (
            tuple(self.kept),
            tuple(
                (leaf, bias, place.leaf_axes, place.formula)
                for leaf, bias in self._biases.items()
                for place in self._places(leaf)
            ),
        )

    def parameters(self, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """Returns the folded kernels and their biases."""
        steps = [
            step
            for leaf in self._biases
            for place in self._places(leaf)
            for step in place.steps
        ]
        operands = [s.operand for s in steps if s.operand is not None]
        env = self._program.evaluate(
            self._program.live(operands, effects=False),
            dict(zip(self._program.leaves, leaves)),
        )
        found = {}
        for leaf, bias in self._biases.items():
            kernel = jnp.asarray(leaves[leaf])
            dtypes = {
                self._program.values[step.data].aval.dtype
                for place in self._places(leaf)
                for step in place.steps
            }
            wide = jnp.result_type(jnp.float32, kernel.dtype, *dtypes)
            scaled, offset = kernel.astype(wide), jnp.zeros((), wide)
            front, fold = self._fronts.get(leaf), self._kernels.get(leaf)
            if front:
                slope, shift = self._slope_and_offset(front, env, wide)
                shift = _place(shift, front.leaf_axes, kernel.ndim)
                size = self._feature_lengths(front.output)
                offset = _sum(shift * scaled, front.output_axes).reshape(size)
                scaled *= _place(slope, front.leaf_axes, kernel.ndim)
            if fold:
                slope, shift = self._slope_and_offset(fold, env, wide)
                offset = offset * slope + shift
                scaled *= _place(slope, fold.leaf_axes, kernel.ndim)
            # Rounded once, here.
            found[self._names[leaf]] = scaled.astype(kernel.dtype)
            found[bias] = offset
        return found

    def _places(self, leaf: int) -> list[Fold | Front]:
        found: list[Fold | Front | None] = [
            self._kernels.get(leaf),
            self._fronts.get(leaf),
        ]
        return [place for place in found if place]

    def _feature_lengths(self, product: Product) -> list[int]:
        shape = self._program.shape(product.kernel)
        return [shape[axis] for axis in product.kernel_axes]

    def _slope_and_offset(
        self, fold: Fold | Front, env: dict[int, Any], dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        size = self._feature_lengths(fold.product)
        slope, offset = jnp.ones(size, dtype), jnp.zeros(size, dtype)
        for step in fold.steps:
            if step.operand is None:
                slope, offset = -slope, -offset
                continue
            operand = _take(jnp.asarray(env[step.operand], dtype), step.axes)
            if step.op.name == "mul":
                slope, offset = slope * operand, offset * operand
            elif step.op.name == "div":
                slope, offset = slope / operand, offset / operand
            elif step.op.name == "add":
                offset = offset + operand
            elif step.slot == 0:
                offset = offset - operand
            else:
                slope, offset = -slope, operand - offset
        return slope, offset

    def run(self, params: dict[str, Any], inputs: Sequence[Any]) -> list[Any]:
        """Returns the leaves of the result."""
        given = dict(zip(self._program.arguments, inputs))
        names = self.kept | {leaf: self._names[leaf] for leaf in self._biases}
        for leaf, name in names.items():
            given[self._program.leaves[leaf]] = params[name]
        instead: dict[Op, Any] = {}
        for front in self._fronts.values():
            for step in front.steps:
                shape = self._program.shape(step.op.outputs[0])
                instead[step.op] = functools.partial(_spread, step, shape)
            if front.leaf not in self._kernels:
                bias = params[self._biases[front.leaf]]
                instead[front.output.op] = functools.partial(
                    _product, front.output, bias
                )
        for fold in self._folds:
            for step in fold.steps:
                instead[step.op] = operator.itemgetter(step.data)
            bias = params[self._biases[fold.leaf]]
            instead[step.op] = functools.partial(_shift, step, bias)
        env = self._program.evaluate(self._ops, given, instead)
        return [env[v] for v in self._program.outputs]


def _shift(step: Step, bias: jax.Array, env: dict[int, Any]) -> jax.Array:
    x: jax.Array = env[step.data]
    return x + _place(bias.astype(x.dtype), step.axes, x.ndim)


def _spread(
    step: Step, shape: tuple[int, ...], env: dict[int, Any]
) -> jax.Array:
    x: jax.Array = env[step.data]
    return x if x.shape == shape else jnp.broadcast_to(x, shape)


def _product(
    product: Product, bias: jax.Array, env: dict[int, Any]
) -> jax.Array:
    (y,) = product.op.run([env[v] for v in product.op.inputs])
    shifted: jax.Array = y + _place(bias.astype(y.dtype), product.axes, y.ndim)
    return shifted


def _sum(kernel: jax.Array, axes: Axes) -> jax.Array:
    """Sums over all but these axes, and puts them in this order."""
    kept = [axis for axis in axes if axis is not None]
    rest = [axis for axis in range(kernel.ndim) if axis not in kept]
    rank = {axis: i for i, axis in enumerate(sorted(kept))}
    return kernel.sum(rest).transpose([rank[axis] for axis in kept])


def _place(vector: jax.Array, axes: Axes, ndim: int) -> jax.Array:
    """Spreads one value a feature over the axes that hold the features."""
    vector = vector.squeeze([i for i, axis in enumerate(axes) if axis is None])
    kept = [axis for axis in axes if axis is not None]
    vector = vector.transpose(sorted(range(len(kept)), key=kept.__getitem__))
    return jnp.expand_dims(vector, [a for a in range(ndim) if a not in kept])


def _take(operand: jax.Array, axes: Axes) -> jax.Array:
    """Undoes `_place`: operand is constant along every other axis."""
    if operand.ndim == 0:
        return operand
    kept = [axis for axis in axes if axis is not None]
    index = tuple(
        slice(None) if axis in kept else 0 for axis in range(operand.ndim)
    )
    rank = {axis: i for i, axis in enumerate(sorted(kept))}
    vector = operand[index].transpose([rank[axis] for axis in kept])
    return jnp.expand_dims(vector, [i for i, a in enumerate(axes) if a is None])


def _bias_name(kernel: str, taken: set[str]) -> str:
    parent, _, own = kernel.rpartition("/")
    name = "bias" if own in ("kernel", "weight") else f"{own}_bias"
    name = f"{parent}/{name}" if parent else name
    return name if name not in taken else f"{kernel}_folded_bias"
