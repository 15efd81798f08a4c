"""Which normalization folds into which kernel, read off a traced program."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core
import numpy as np

from jaxbn.fold._axes import MOVES, Axes, Product, find_product
from jaxbn.fold._trace import PRODUCTS, Op, Program
from jaxbn.fold._walk import AFFINE, Step, Unfoldable, Walker, between, two

_TRAINING = (
    "is in training mode, or never called: its running statistics do not reach "
    "the output. Pass use_running_average=True or train=False, or call eval()"
)


class Layer(NamedTuple):
    """What became of one batch normalization.

    Attributes:
      norm: path of its variables.
      kernel: name of the parameter that took it in; None where none did.
      kind: "conv", "grouped conv", "depthwise conv", "transposed conv" or
        "dense"; None where it was not folded.
      reason: why it was not folded; None where it was.
    """

    norm: str
    kernel: str | None
    kind: str | None
    reason: str | None


class Fold(NamedTuple):
    """A product, and the steps behind it that its kernel takes in."""

    product: Product
    leaf: int  # the kernel, as an index among the variables
    leaf_axes: Axes
    steps: tuple[Step, ...]
    norms: tuple[str, ...]


class Analysis:
    """Finds all folds of a program, and reasons for what does not fold.

    Attributes:
      program: what was analysed.
      names: of the leaves of its variables.
      folds: in the order of the program.
      layers: a Layer for every use of a normalization, and for one in training
        mode.
    """

    def __init__(
        self, program: Program, names: Sequence[str], norm_of: dict[int, str]
    ):
        self.program, self.names, self._norm_of = program, names, norm_of
        self._walker = Walker(program, names)
        live = program.live(program.outputs)
        self._meetings = [op for op in live if self._statistics(op)]
        self._leaves = collections.defaultdict(set)
        for op in self._meetings:
            for leaf in self._statistics(op):
                self._leaves[norm_of[leaf]].add(leaf)
        self._stops: dict[int, str] = {}  # by the output of the product
        found = [self._fold(op) for op in live if op.name in PRODUCTS]
        self.folds = tuple(fold for fold in found if fold)
        self.layers = self._report()

    def _statistics(self, op: Op) -> frozenset[int]:
        """The leaves that an op brings together with the data."""
        if not self.program.data(op):
            return frozenset()
        facts = [self.program.values[v] for v in op.inputs]
        return frozenset().union(*(fact.statistics for fact in facts))

    def _norms(self, leaves: Iterable[int]) -> list[str]:
        return sorted({self._norm_of[leaf] for leaf in leaves})

    def _fold(self, op: Op) -> Fold | None:
        product = find_product(self.program, op)
        if product is None:
            return None
        steps, stop = self._walker.walk(product)
        seen: set[int] = set()
        end, norms = 0, []
        for i, step in enumerate(steps):
            seen |= self._statistics(step.op)
            # Half a normalization would be right too, and help nobody.
            if seen and all(self._leaves[n] <= seen for n in self._norms(seen)):
                end, norms = i + 1, self._norms(seen)
        self._stops[op.outputs[0]] = stop
        if not end:
            return None
        try:
            leaf, axes = self._walker.kernel(product)
        except Unfoldable as reason:
            self._stops[op.outputs[0]] = str(reason)
            return None
        return Fold(product, leaf, axes, tuple(steps[:end]), tuple(norms))

    def _report(self) -> tuple[Layer, ...]:
        taken = {step.op: fold for fold in self.folds for step in fold.steps}
        found: dict[Layer, None] = {}  # in the order of the program
        for op in self._meetings:
            fold = taken.get(op)
            facts: tuple[str | None, str | None, str | None]
            if fold:
                facts = (self.names[fold.leaf], fold.product.kind, None)
            else:
                facts = (None, None, self._why(op))
            for norm in self._norms(self._statistics(op)):
                found[Layer(norm, *facts)] = None
        idle = set(self._norm_of.values()) - {layer.norm for layer in found}
        dead = [norm for norm in sorted(idle) if not self._is_uncalled(norm)]
        return (*found, *(Layer(norm, None, None, _TRAINING) for norm in dead))

    def _is_uncalled(self, norm: str) -> bool:
        """Whether a normalization has scale or bias, and they are unused too."""
        own = [
            self._walker.is_used(value)
            for i, value in enumerate(self.program.leaves)
            if i not in self._norm_of
            and f"/{self.names[i]}".rpartition("/")[0].endswith(f"/{norm}")
        ]
        return bool(own) and not any(own)

    def _why(self, op: Op) -> str:
        """Returns why what meets the statistics in op is not folded."""
        if list(jax.extend.core.jaxprs_in_params(op.eqn.params)):
            return f"lies inside `{op.label}`, whose body is left alone"
        leaves = [self.program.leaves[i] for i in self._statistics(op)]
        rank = min(len(self.program.shape(leaf)) for leaf in leaves)
        value = self.program.data(op)[0]
        if len(self.program.shape(value)) <= rank:
            # Without an axis for examples this is the update of an average.
            return _TRAINING
        if op.name not in AFFINE:
            return f"uses its running statistics in `{op.label}`"
        while value in self.program.producer and value not in self._stops:
            op = self.program.producer[value]
            data = self.program.data(op)
            if len(data) > 1:
                return two(op)
            if op.name not in MOVES | AFFINE:
                return between(op)
            value = data[0]
        return self._stops.get(
            value, "normalizes an input: no layer stands in front of it"
        )

    def formula(self, fold: Fold) -> tuple[Any, ...]:
        """What slope and offset are computed from, whatever the batch size."""
        operands = [s.operand for s in fold.steps if s.operand is not None]
        ops = self.program.live(operands, effects=False)
        ops += [step.op for step in fold.steps]
        return tuple(
            (op.name, *map(self._known, op.inputs))
            for op in ops
            if op.name not in MOVES
        )

    def _known(self, value: int) -> Any:
        while value in self.program.producer:
            op = self.program.producer[value]
            if op.name not in MOVES:
                return None
            value = op.inputs[0]
        if value in self.program.constants:
            return np.asarray(self.program.constants[value]).tobytes()
        return value  # leaves and arguments have the same numbers every time
