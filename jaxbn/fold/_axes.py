"""Where the features of a kernel lie, on the way to it and behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxbn._jaxpr import ELEMENTWISE, MOVES
from jaxbn.fold._trace import Op, Program

# Of each feature axis of a kernel, in its order; None for one of length 1.
Axes = tuple[int | None, ...]


class Product(NamedTuple):
    """A convolution or matrix product of data with a computed kernel.

    `input_side` has the features of the data in place of those of the output.
    """

    op: Op
    slot: int  # of the kernel among the op's inputs
    kernel_axes: tuple[int, ...]  # of the features, in the kernel
    axes: Axes  # of the features, in the output
    kind: str

    @property
    def kernel(self) -> int:
        return self.op.inputs[self.slot]


def find_product(program: Program, op: Op) -> Product | None:
    """Returns what op multiplies the data with, if it does not depend on it."""
    facts = [program.values[v] for v in op.inputs]
    if facts[0].is_data == facts[1].is_data:
        return None
    slot = 0 if facts[1].is_data else 1
    kernel_axes: tuple[int, ...]
    axes: tuple[int, ...]
    if op.name == "conv_general_dilated":
        spec = op.eqn.params["dimension_numbers"]
        kernel_axes, axes = (spec.rhs_spec[0],), (spec.out_spec[1],)
        kind = _kind_of_conv(program, op)
    else:
        kernel_axes, axes = _dot_axes(program, op, slot)
        kind = "dense"
    if kind != "dense" and slot == 0:
        return None
    shape = program.shape(op.outputs[0])
    long = tuple(None if shape[axis] == 1 else axis for axis in axes)
    return Product(op, slot, kernel_axes, long, kind)


def _dot_axes(
    program: Program, op: Op, slot: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    contracted, batch = op.eqn.params["dimension_numbers"]
    free = [
        [
            axis
            for axis in range(len(program.shape(v)))
            if axis not in (*contracted[i], *batch[i])
        ]
        for i, v in enumerate(op.inputs)
    ]
    # The output has the batch axes, then what is left of either side.
    shared = range(len(batch[0]))
    first = len(batch[0]) + (len(free[0]) if slot else 0)
    own = range(first, first + len(free[slot]))
    return (*batch[slot], *free[slot]), (*shared, *own)


def input_side(program: Program, product: Product) -> Product | None:
    """Returns the same for the features of the data, which are summed over.

    Its axes are those in the data. None where what is added to a feature does
    not become the same number for each output: at the padding of a convolution.
    """
    op, slot = product.op, product.slot
    params = op.eqn.params
    kernel_axes: tuple[int, ...]
    axes: tuple[int, ...]
    if op.name == "conv_general_dilated":
        padded = any(map(any, params["padding"]))
        if product.kind != "conv" or padded or params["batch_group_count"] > 1:
            return None
        spec = params["dimension_numbers"]
        kernel_axes, axes = (spec.rhs_spec[1],), (spec.lhs_spec[1],)
    else:
        contracted, batch = params["dimension_numbers"]
        kernel_axes = (*batch[slot], *contracted[slot])
        axes = (*batch[1 - slot], *contracted[1 - slot])
    shape = program.shape(op.inputs[1 - slot])
    long = tuple(None if shape[axis] == 1 else axis for axis in axes)
    return product._replace(kernel_axes=kernel_axes, axes=long)


def _kind_of_conv(program: Program, op: Op) -> str:
    params = op.eqn.params
    if any(n != 1 for n in params["lhs_dilation"]):
        return "transposed conv"
    if params["feature_group_count"] == 1:
        return "conv"
    axis = params["dimension_numbers"].lhs_spec[1]
    features = program.shape(op.inputs[0])[axis]
    depthwise = params["feature_group_count"] == features
    return "depthwise conv" if depthwise else "grouped conv"


def axes_at_leaf(
    program: Program, leaf: int, path: Sequence[Op], product: Product
) -> Axes | None:
    """Returns where a leaf has the features of the kernel that it becomes.

    path: the MOVES ops from leaf to product. None where they mix axes.
    """
    found = {}
    for start, length in enumerate(program.shape(leaf)):
        axis = None if length == 1 else start
        for op in path:
            axis = None if axis is None else follow(program, op, axis)
        found[axis] = start
    lengths = program.shape(product.kernel)
    kept = [axis for axis in product.kernel_axes if lengths[axis] != 1]
    if any(axis not in found for axis in kept):
        return None
    return tuple(
        found[axis] if axis in kept else None for axis in product.kernel_axes
    )


def follow(program: Program, op: Op, axis: int) -> int | None:
    """Returns where a MOVES op puts an axis; None where it gets lost."""
    before, after = program.shape(op.inputs[0]), program.shape(op.outputs[0])
    params = op.eqn.params
    moved: int | None
    if op.name == "broadcast_in_dim":
        moved = params["broadcast_dimensions"][axis]
    elif op.name == "transpose":
        moved = params["permutation"].index(axis)
    elif op.name in ("reshape", "squeeze", "expand_dims"):
        moved = _same_place(before, after, axis)
    elif op.name == "rev" and axis in params["dimensions"]:
        moved = None
    else:
        moved = axis
    if moved is None or after[moved] != before[axis]:
        return None
    return moved


def follow_back(program: Program, op: Op, axes: Axes) -> Axes | None:
    """Returns where a MOVES op found axes; None where it made one."""
    origin = {
        follow(program, op, axis): axis
        for axis in range(len(program.shape(op.inputs[0])))
    }
    if any(axis is not None and axis not in origin for axis in axes):
        return None
    return tuple(None if axis is None else origin[axis] for axis in axes)


def _same_place(
    before: Sequence[int], after: Sequence[int], axis: int
) -> int | None:
    """Finds the axis as long as this one, with as many rows in front of it."""
    rows = math.prod(before[:axis])
    for moved, length in enumerate(after):
        if length == before[axis] and math.prod(after[:moved]) == rows:
            return moved
    return None


def varying(program: Program, ops: Iterable[Op]) -> list[frozenset[int]]:
    """Returns for each value axes outside of which it is surely constant."""
    axes = [
        frozenset(a for a, n in enumerate(program.shape(v)) if n != 1)
        for v in range(len(program.values))
    ]
    for op in ops:
        found: set[int | None] = {None}
        if op.name in MOVES - {"rev"}:
            found = {follow(program, op, axis) for axis in axes[op.inputs[0]]}
        elif op.name in ELEMENTWISE:
            found = set().union(*(axes[v] for v in op.inputs))
        if None not in found:
            axes[op.outputs[0]] = frozenset(a for a in found if a is not None)
    return axes
