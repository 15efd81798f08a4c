"""Follows values between a normalization and the adjacent kernel."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

from jaxbn._jaxpr import MOVES
from jaxbn.fold._axes import (
    Axes,
    Product,
    axes_at_leaf,
    follow,
    follow_back,
    varying,
)
from jaxbn.fold._trace import Op, Program

AFFINE = frozenset(["add", "sub", "mul", "div", "neg"])


class Unfoldable(Exception):
    """Carries the reason, worded to follow the name of the layer."""


class Step(NamedTuple):
    """A scaling or shift of each feature by something no input changes."""

    op: Op
    slot: int  # of the data among the op's inputs
    axes: Axes

    @property
    def data(self) -> int:
        return self.op.inputs[self.slot]

    @property
    def operand(self) -> int | None:
        return None if self.op.name == "neg" else self.op.inputs[1 - self.slot]


class Walker:
    """Walks a program from a product, both ways, as far as it can be folded."""

    def __init__(self, program: Program, names: Sequence[str]):
        self._program, self._names = program, names
        live = program.live(program.outputs)
        self._varying = varying(program, live)
        self._users = collections.defaultdict(list)
        for op in live:
            for v in op.inputs:
                self._users[v].append(op)

    def is_used(self, value: int) -> bool:
        return value in self._users or value in self._program.outputs

    def kernel(self, product: Product) -> tuple[int, Axes]:
        """Returns the leaf that is the kernel, and its axes of features."""
        value = product.kernel
        path: list[Op] = []
        while value not in self._program.leaves:
            op = self._program.producer.get(value)
            if op is None:
                raise Unfoldable("follows a layer whose kernel is a constant")
            if op.name not in MOVES:
                raise Unfoldable(
                    f"follows a layer whose kernel is computed (`{op.label}`), "
                    "not a variable"
                )
            path.insert(0, op)
            value = op.inputs[0]
        leaf = self._program.leaves.index(value)
        axes = axes_at_leaf(self._program, value, path, product)
        real = map(self._program.is_real, (value, product.op.outputs[0]))
        if axes is None or not all(real):
            dtype = self._program.values[value].aval.dtype
            raise Unfoldable(
                f"follows a layer whose kernel {self._names[leaf]!r}, "
                f"{dtype}{list(self._program.shape(value))}, is not "
                "floating or has no axis for the features alone"
            )
        return leaf, axes

    def destinations(self, value: int) -> list[str]:
        """Returns the labels of all that a value goes into, moved or not."""
        ops = [op for op in self._users[value] if op.name in MOVES]
        found = [
            f"`{op.label}`" for op in self._users[value] if op not in ops
        ] + ["the result"] * self._program.outputs.count(value)
        for op in ops:
            found += self.destinations(op.outputs[0])
        return found

    def walk(self, product: Product) -> tuple[list[Step], str]:
        """Follows the output of a product; returns steps and what ends them."""
        steps: list[Step] = []
        value, axes = product.op.outputs[0], product.axes
        while True:
            try:
                op = self._next(value)
                if op.name in MOVES:
                    axes = self._moved(op, axes)
                else:
                    steps.append(self._step(op, value, axes))
            except Unfoldable as reason:
                return steps, str(reason)
            value = op.outputs[0]

    def walk_back(self, side: Product) -> list[Step]:
        """Follows the data of a product back; the last step comes first."""
        steps: list[Step] = []
        value, axes = side.op.inputs[1 - side.slot], side.axes
        while value in self._program.producer:
            op = self._program.producer[value]
            data = self._program.data(op)
            try:
                self._next(value)
                if len(data) != 1 or not self._program.is_real(data[0]):
                    raise Unfoldable(between(op))
                if op.name in MOVES:
                    before = follow_back(self._program, op, axes)
                    if before is None:
                        raise Unfoldable(between(op))
                    axes = before
                else:
                    steps.append(self._step(op, data[0], axes, spreads=True))
            except Unfoldable:
                break
            value = data[0]
            shape = self._program.shape(value)
            axes = tuple(
                None if axis is None or shape[axis] == 1 else axis
                for axis in axes
            )
        return steps

    def _next(self, value: int) -> Op:
        users = self._users[value]
        uses = [f"`{op.label}`" for op in users]
        uses += ["the result"] * self._program.outputs.count(value)
        if len(uses) != 1 or not users:
            raise Unfoldable(
                "takes in a value that is also used elsewhere: it goes into "
                + " and ".join(uses)
                + _hint("".join(uses))
            )
        return users[0]

    def _moved(self, op: Op, axes: Axes) -> Axes:
        if not self._program.is_real(op.outputs[0]):
            raise Unfoldable(between(op))
        moved = tuple(
            None if axis is None else follow(self._program, op, axis)
            for axis in axes
        )
        if moved.count(None) > axes.count(None):
            raise Unfoldable(
                f"follows `{op.label}`, which splits, merges or reorders the "
                "features of the layer in front"
            )
        return moved

    def _step(
        self, op: Op, value: int, axes: Axes, *, spreads: bool = False
    ) -> Step:
        """spreads: a feature of length 1 may become as long as the operand."""
        step = Step(op, op.inputs.index(value), axes)
        if len(self._program.data(op)) > 1:
            raise Unfoldable(two(op))
        if op.name not in AFFINE or (op.name == "div" and step.slot == 1):
            raise Unfoldable(between(op))
        if step.operand is None:
            return step
        shape = self._program.shape(value)
        after = self._program.shape(op.outputs[0])
        grown = {i for i, (a, b) in enumerate(zip(shape, after)) if a != b}
        if len(shape) != len(after) or not grown <= set(
            axes if spreads else ()
        ):
            raise Unfoldable(between(op))
        others = sorted(self._varying[step.operand] - set(axes))
        if others:
            raise Unfoldable(
                f"follows a layer with other features: axis {others[0]} of "
                f"{list(shape)}, in `{op.label}`, is none of them"
            )
        return step


def between(op: Op) -> str:
    return (
        f"follows `{op.label}`: only a convolution or dense layer, scaled and "
        f"shifted feature by feature, takes it in{_hint(op.name)}"
    )


def two(op: Op) -> str:
    return f"follows `{op.label}` of two values that depend on the input"


def _hint(name: str) -> str:
    if "reduce_sum" not in name:
        return ""
    return ". If it is in training mode, pass train=False"
