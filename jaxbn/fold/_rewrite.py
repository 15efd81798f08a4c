"""The folded program: what its parameters are, and how it runs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.fold._axes import Axes
from jaxbn.fold._chain import Analysis, Fold
from jaxbn.fold._trace import Op
from jaxbn.fold._walk import Step


class Rewritten:
    """A program with kernels and biases in place of its normalizations.

    Attributes:
      kept: names of the leaves that are needed as they are, by index.
      signature: equal for two programs that take the same parameters.
    """

    def __init__(self, analysis: Analysis):
        self._program, self._folds = analysis.program, analysis.folds
        self._names = analysis.names
        steps = [step for fold in self._folds for step in fold.steps]
        only = {step.op: step.data for step in steps}
        self._ops = self._program.live(self._program.outputs, only)
        needed = set(self._program.outputs)
        for op in self._ops:
            needed.update([only[op]] if op in only else op.inputs)
        kernels = {fold.leaf for fold in self._folds}
        self.kept = {
            i: self._names[i]
            for i, v in enumerate(self._program.leaves)
            if v in needed and i not in kernels
        }
        # Products that share a kernel share its bias.
        self._kernels = {fold.leaf: fold for fold in self._folds}
        self._biases: dict[int, str] = {}
        for leaf in self._kernels:
            taken = {*self.kept.values(), *self._biases.values()}
            self._biases[leaf] = _bias_name(self._names[leaf], taken)
        self.signature = (
            tuple(self.kept),
            tuple(
                (leaf, fold.leaf_axes, self._biases[leaf], fold.formula)
                for leaf, fold in self._kernels.items()
            ),
        )

    def parameters(self, leaves: Sequence[Any]) -> dict[str, jax.Array]:
        """Returns the folded kernels and their biases."""
        operands = [
            step.operand
            for fold in self._kernels.values()
            for step in fold.steps
            if step.operand is not None
        ]
        env = self._program.evaluate(
            self._program.live(operands, effects=False),
            dict(zip(self._program.leaves, leaves)),
        )
        found = {}
        for fold in self._kernels.values():
            kernel = jnp.asarray(leaves[fold.leaf])
            values = [self._program.values[step.data] for step in fold.steps]
            dtypes = {value.aval.dtype for value in values}
            wide = jnp.result_type(jnp.float32, kernel.dtype, *dtypes)
            slope, offset = self._slope_and_offset(fold, env, wide)
            slope = _place(slope, fold.leaf_axes, kernel.ndim)
            # Rounded once, here.
            scaled = (kernel.astype(wide) * slope).astype(kernel.dtype)
            found[self._names[fold.leaf]] = scaled
            found[self._biases[fold.leaf]] = offset
        return found

    def _slope_and_offset(
        self, fold: Fold, env: dict[int, Any], dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        shape = self._program.shape(fold.product.kernel)
        size = [shape[axis] for axis in fold.product.kernel_axes]
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
        names = self.kept | {leaf: self._names[leaf] for leaf in self._kernels}
        for leaf, name in names.items():
            given[self._program.leaves[leaf]] = params[name]
        instead: dict[Op, Any] = {}
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
