"""Whether features are scaled and shifted by the same, in two places."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbn._jaxpr import ELEMENTWISE, MOVES
from jaxbn.fold._axes import Axes, follow
from jaxbn.fold._trace import Op, Program
from jaxbn.fold._walk import Step

_POINTWISE = ELEMENTWISE | {"convert_element_type"}

# What computes a slope and an offset, step by step.
Formula = tuple[tuple[str, int, str | None], ...]


class Formulas:
    """Fingerprints of the values that features are scaled and shifted by.

    Two are equal only if the same function of the same variables gives the
    value of each feature, whatever the shapes and the rank of the data that it
    was spread over. They can be compared between programs.
    """

    def __init__(self, program: Program):
        self._program = program
        self._known: dict[tuple[int, Axes], str] = {}

    def of(self, steps: Sequence[Step]) -> Formula:
        return tuple(
            (
                step.op.name,
                step.slot,
                None
                if step.operand is None
                else self._value(step.operand, step.axes),
            )
            for step in steps
        )

    def _value(self, value: int, axes: Axes) -> str:
        """axes: of the features, in this value."""
        shape = self._program.shape(value)
        axes = tuple(
            a if a is not None and a < len(shape) and shape[a] != 1 else None
            for a in axes
        )
        if (value, axes) not in self._known:
            self._known[value, axes] = self._digest(value, axes)
        return self._known[value, axes]

    def _digest(self, value: int, axes: Axes) -> str:
        op = self._program.producer.get(value)
        if op and op.name in MOVES:
            before = self._before(op, axes)
            if before is not None and op.name != "convert_element_type":
                return self._value(op.inputs[0], before)
        words = repr(self._words(value, axes)).encode()
        return hashlib.blake2b(words, digest_size=16).hexdigest()

    def _words(self, value: int, axes: Axes) -> tuple[Any, ...]:
        program = self._program
        if value in program.leaves:
            return ("variable", program.leaves.index(value), axes)
        if value in program.constants:
            return ("constant", *_content(program.constants[value]), axes)
        op = program.producer[value]
        rank = len(program.shape(value))
        shapes = [program.shape(v) for v in op.inputs]
        if op.name in _POINTWISE and all(len(s) in (0, rank) for s in shapes):
            inputs = [
                self._value(v, axes if s else (None,) * len(axes))
                for v, s in zip(op.inputs, shapes)
            ]
            return (op.name, _settings(op), *inputs)
        whole = [
            self._value(v, tuple(range(len(program.shape(v)))))
            for v in op.inputs
        ]
        return (
            op.name,
            _settings(op),
            op.outputs.index(value),
            shapes,
            axes,
            *whole,
        )

    def _before(self, op: Op, axes: Axes) -> Axes | None:
        """Returns where the features were; None where other axes came in."""
        value = op.inputs[0]
        origin: dict[int | None, int] = {}
        for axis, length in enumerate(self._program.shape(value)):
            if length != 1:
                origin[follow(self._program, op, axis)] = axis
        if not set(origin) <= set(axes) - {None}:
            return None
        return tuple(origin.get(axis) for axis in axes)


def _settings(op: Op) -> str:
    # jax.default_matmul_precision may differ between the programs.
    params = {k: v for k, v in op.eqn.params.items() if k != "precision"}
    return repr(sorted(params.items()))


def _content(constant: Any) -> tuple[Any, ...]:
    try:
        array = np.asarray(constant)
    except TypeError:  # a random key
        return ("object", id(constant))
    return (str(array.dtype), array.shape, array.tobytes())
