"""A traced function as one flat list of operations on numbered values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core

PRODUCTS = frozenset(["conv_general_dilated", "dot_general"])
_CALLS = frozenset(["jit", "pjit", "call", "closed_call", "core_call"])
# Their derivative, or what they keep for it, is not that of their body: they
# are opened only where there may be something to fold.
_GUARDED_CALLS = frozenset(
    ["custom_jvp_call", "custom_vjp_call", "checkpoint", "remat", "remat2"]
)


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
        if self.name in _GUARDED_CALLS:
            info = _body(self.eqn).jaxpr.debug_info
            return getattr(info, "func_name", self.name)
        return str(self.eqn.params.get("name") or self.name)

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Computes the outputs in the equation's own context."""
        literal = jax.extend.core.Literal
        atoms = zip(self.eqn.invars, values)
        given = {a: v for a, v in atoms if not isinstance(a, literal)}
        alone = jax.extend.core.Jaxpr(
            constvars=[],
            invars=list(given),
            outvars=self.eqn.outvars,
            eqns=[self.eqn],
            effects=self.eqn.effects,
            debug_info=jax.extend.core.DebugInfo("fold", self.name, None, None),
        )
        return jax.core.eval_jaxpr(alone, [], *given.values())


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
        self.outputs = self._inline(closed.jaxpr, closed.consts, inputs)
        self.producer = {v: op for op in self.ops for v in op.outputs}

    def _new(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _constant(self, constant: Any, aval: Any) -> int:
        value = self._new(Value(aval, False, False, frozenset()))
        self.constants[value] = constant
        return value

    def _inline(
        self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[int]
    ) -> list[int]:
        env: dict[Any, int] = dict(zip(jaxpr.invars, inputs))
        for v, constant in zip(jaxpr.constvars, constants):
            env[v] = self._constant(constant, v.aval)

        def read(atom: Any) -> int:
            if isinstance(atom, jax.extend.core.Literal):
                return self._constant(atom.val, atom.aval)
            return env[atom]

        for eqn in jaxpr.eqns:
            given = [read(atom) for atom in eqn.invars]
            body = _body(eqn)
            if body is not None and self._opens(eqn, body, given):
                outputs = self._inline(body.jaxpr, body.consts, given)
            else:
                outputs = self._append(eqn, given)
            env.update(zip(eqn.outvars, outputs))
        return [read(atom) for atom in jaxpr.outvars]

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
        if not variable or len(body.jaxpr.invars) != len(given):
            return False
        return (
            eqn.primitive.name in _CALLS
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
        return getattr(self.values[value].aval, "shape", ())

    def is_real(self, value: int) -> bool:
        dtype = getattr(self.values[value].aval, "dtype", bool)
        return jax.numpy.issubdtype(dtype, jax.numpy.floating)


def _body(eqn: Any) -> Any:
    """Returns the closed jaxpr of a call; None for other equations."""
    if eqn.primitive.name not in _CALLS | _GUARDED_CALLS:
        return None
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if body is None or hasattr(body, "consts"):
        return body
    core: Any = jax.extend.core  # types of some versions leave this class out
    return core.ClosedJaxpr(body, [])


def _multiplies(body: Any) -> bool:
    """Whether a convolution or matrix product lies in the body of a call."""
    eqns = body.jaxpr.eqns
    if any(eqn.primitive.name in PRODUCTS for eqn in eqns):
        return True
    inner = [_body(eqn) for eqn in eqns]
    return any(_multiplies(body) for body in inner if body is not None)
