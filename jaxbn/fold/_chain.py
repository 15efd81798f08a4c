"""Which normalization folds into which kernel, read off a traced program."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.extend.core

from jaxbn.fold._axes import MOVES, Axes, Product, find_product
from jaxbn.fold._formula import Formula, Formulas
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
    formula: Formula  # equal for all products of one kernel


class _Chain(NamedTuple):
    """A product with whole normalizations behind it."""

    product: Product
    leaf: int
    leaf_axes: Axes
    steps: tuple[Step, ...]
    ends: tuple[int, ...]  # numbers of steps that no normalization is cut by
    formula: Formula


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
        self,
        program: Program,
        names: Sequence[str],
        norm_of: dict[int, str],
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
        self._formulas = Formulas(program)
        chains = collections.defaultdict(list)
        for op in live:
            chain = self._chain(op) if op.name in PRODUCTS else None
            if chain:
                chains[chain.leaf].append(chain)
        found = [fold for c in chains.values() for fold in self._folds(c)]
        order = {op: i for i, op in enumerate(live)}
        self.folds = tuple(sorted(found, key=lambda f: order[f.product.op]))
        self.layers = self._report()

    def _statistics(self, op: Op) -> frozenset[int]:
        """The leaves that an op brings together with the data."""
        return self.program.statistics(op) & self._norm_of.keys()

    def _norms(self, leaves: Iterable[int]) -> list[str]:
        return sorted({self._norm_of[leaf] for leaf in leaves})

    def _chain(self, op: Op) -> _Chain | None:
        product = find_product(self.program, op)
        if product is None:
            return None
        steps, stop = self._walker.walk(product)
        seen: set[int] = set()
        ends = []
        for i, step in enumerate(steps):
            seen |= self._statistics(step.op)
            # Half a normalization would be right too, and help nobody.
            if seen and all(self._leaves[n] <= seen for n in self._norms(seen)):
                ends.append(i + 1)
        self._stops[op.outputs[0]] = stop
        if not ends:
            return None
        try:
            leaf, axes = self._walker.kernel(product)
        except Unfoldable as reason:
            self._stops[op.outputs[0]] = str(reason)
            return None
        formula = self._formulas.of(steps)
        return _Chain(product, leaf, axes, tuple(steps), tuple(ends), formula)

    def _folds(self, chains: Sequence[_Chain]) -> list[Fold]:
        """Returns the folds of the products that share a kernel."""
        first = chains[0]
        uses = self._walker.destinations(self.program.leaves[first.leaf])
        alike = len(uses) == len(chains) and all(
            chain.leaf_axes == first.leaf_axes for chain in chains
        )
        ends = [
            end
            for end in first.ends
            if all(c.formula[:end] == first.formula[:end] for c in chains)
        ]
        if alike and ends:
            return [
                Fold(
                    *chain[:3],
                    chain.steps[: ends[-1]],
                    first.formula[: ends[-1]],
                )
                for chain in chains
            ]
        for chain in chains:
            self._stops[chain.product.op.outputs[0]] = (
                f"follows a layer whose kernel {self.names[first.leaf]!r} is "
                f"also used elsewhere: it goes into {' and '.join(uses)}. One "
                "kernel folds only if the same normalization follows every use"
            )
        return []

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
