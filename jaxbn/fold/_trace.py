"""A traced function as one flat list of operations on numbered values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from jaxbn._compat import dtype_of, shape_of
from jaxbn._compat.jaxprs import (
    evaluate_equation,
    function_name,
    without_constants,
)
from jaxbn._jaxpr import CALLS, GUARDED_CALLS, called, interpret

PRODUCTS = frozenset(["conv_general_dilated", "dot_general"])


class Value(NamedTuple):
    """What is known of a value before it is computed."""

    aval: Any  # shape and dtype
    is_data: bool  # depends on the inputs
    is_variable: bool  # depends on the variables
    statistics: frozenset[int]  # leaves it is computed from; none if is_data


class Op(NamedTuple):
    """An equation, with the values it reads and writes."""

    eqn: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.eqn.primitive.name)

    @property
    def label(self) -> str:
        """The name a reader of the model knows: relu, not custom_jvp_call."""
        if self.name in GUARDED_CALLS:
            return function_name(called(self.eqn), self.name)
        return str(self.eqn.params.get("name") or self.name)

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Computes the outputs in the equation's own context."""
        return evaluate_equation(self.eqn, values)


class Program:
    """apply(variables, *inputs), with the calls that matter opened.

    Attributes:
      values: what is known of each value; a value is its index here.
      leaves: values of the leaves of variables.
      arguments: values of the leaves of inputs.
      constants: values that are known.
      ops: in order of execution.
      outputs: values of the leaves of the result.
      producer: the op that writes a value.
    """

    def __init__(self, closed: Any, is_statistic: Sequence[bool]):
        self.values: list[Value] = []
        self.constants: dict[int, Any] = {}
        self.ops: list[Op] = []
        avals = [v.aval for v in closed.jaxpr.invars]
        nothing: frozenset[int] = frozenset()
        self.leaves = [
            self._new(
                Value(aval, False, True, frozenset([i]) if s else nothing)
            )
            for i, (aval, s) in enumerate(zip(avals, is_statistic))
        ]
        self.arguments = [
            self._new(Value(aval, True, False, nothing))
            for aval in avals[len(is_statistic) :]
        ]
        inputs = self.leaves + self.arguments
        self.outputs = self._inline(closed, inputs)
        self.producer = {v: op for op in self.ops for v in op.outputs}

    def _new(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _constant(self, atom: Any, constant: Any) -> int:
        value = self._new(Value(atom.aval, False, False, frozenset()))
        self.constants[value] = constant
        return value

    def _inline(self, code: Any, inputs: Sequence[int]) -> list[int]:
        """Appends all equations; the calls that matter are opened."""

        def equation(eqn: Any, given: Sequence[int]) -> list[int]:
            body = called(eqn)
            # A guarded call is opened only where there is something to fold.
            if body is not None and self._opens(eqn, body, given):
                return self._inline(body, given)
            return self._append(eqn, given)

        return interpret(code, inputs, equation, self._constant)

    def _append(self, eqn: Any, given: Sequence[int]) -> list[int]:
        facts = [self.values[v] for v in given]
        is_data = any(fact.is_data for fact in facts)
        is_variable = any(fact.is_variable for fact in facts)
        statistics = frozenset().union(*(fact.statistics for fact in facts))
        if is_data:
            statistics = frozenset()
        outputs = [
            self._new(Value(v.aval, is_data, is_variable, statistics))
            for v in eqn.outvars
        ]
        self.ops.append(Op(eqn, tuple(given), tuple(outputs)))
        return outputs

    def _opens(self, eqn: Any, body: Any, given: Sequence[int]) -> bool:
        facts = [self.values[v] for v in given]
        variable = any(f.is_variable and not f.is_data for f in facts)
        if not variable or len(without_constants(body).invars) != len(given):
            return False
        return (
            eqn.primitive.name in CALLS
            or any(fact.statistics for fact in facts)
            or _multiplies(body)
        )

    def live(
        self,
        outputs: Iterable[int],
        only: dict[Op, int] | None = None,
        *,
        effects: bool = True,
    ) -> list[Op]:
        """Returns the ops that the outputs need.

        only: for some ops the one input that is still needed.
        effects: with the ops that are run for an effect.
        """
        needed = set(outputs)
        kept = []
        for op in reversed(self.ops):
            wanted = bool(op.eqn.effects) and effects
            if not wanted and needed.isdisjoint(op.outputs):
                continue
            needed.update([only[op]] if only and op in only else op.inputs)
            kept.append(op)
        return kept[::-1]

    def evaluate(
        self,
        ops: Iterable[Op],
        given: dict[int, Any],
        instead: dict[Op, Callable[[dict[int, Any]], Any]] | None = None,
    ) -> dict[int, Any]:
        """Returns the values of all ops.

        instead: for some ops what is computed in their place.
        """
        env = self.constants | given
        for op in ops:
            if instead and op in instead:
                outputs = [instead[op](env)]
            else:
                outputs = op.run([env[v] for v in op.inputs])
            env.update(zip(op.outputs, outputs))
        return env

    def data(self, op: Op) -> list[int]:
        return [v for v in op.inputs if self.values[v].is_data]

    def statistics(self, op: Op) -> frozenset[int]:
        """Returns the running statistics that an op brings to the data."""
        if not self.data(op):
            return frozenset()
        facts = [self.values[v] for v in op.inputs]
        return frozenset().union(*(fact.statistics for fact in facts))

    def shape(self, value: int) -> tuple[int, ...]:
        return shape_of(self.values[value].aval)

    def is_real(self, value: int) -> bool:
        dtype = dtype_of(self.values[value].aval)
        return dtype is not None and jax.numpy.issubdtype(
            dtype, jax.numpy.floating
        )


def _multiplies(code: Any) -> bool:
    """Whether a convolution or matrix product lies in the body of a call."""
    eqns = without_constants(code).eqns
    if any(eqn.primitive.name in PRODUCTS for eqn in eqns):
        return True
    inner = map(called, eqns)
    return any(_multiplies(body) for body in inner if body is not None)
