"""Which normalization folds into which kernel, read off a traced program."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxbn.fold._axes import (
    Axes,
    Product,
    find_product,
    input_side,
)
from jaxbn.fold._formula import Formula, Formulas
from jaxbn.fold._trace import PRODUCTS, Op, Program
from jaxbn.fold._walk import Step, Unfoldable, Walker


class Fold(NamedTuple):
    """A product, and the steps behind it that its kernel takes in."""

    product: Product
    leaf: int  # the kernel, as an index among the variables
    leaf_axes: Axes
    steps: tuple[Step, ...]
    formula: Formula  # equal for all products of one kernel


class Front(NamedTuple):
    """A product, and the steps in front of it that its kernel takes in."""

    product: Product  # its input side
    leaf: int
    leaf_axes: Axes  # of the features of the data
    output_axes: Axes  # of the features of the output, in the leaf too
    output: Product
    steps: tuple[Step, ...]
    formula: Formula


class _Chain(NamedTuple):
    """A product with whole normalizations behind it."""

    product: Product
    leaf: int
    leaf_axes: Axes
    steps: tuple[Step, ...]
    ends: tuple[int, ...]  # numbers of steps that no normalization is cut by
    formula: Formula


class Analysis:
    """Finds all folds of a program, and what ends the others.

    Attributes:
      program: what was analysed.
      names: of the leaves of its variables.
      norm_of: the normalization of each running statistic among them.
      meetings: the ops that bring statistics to the data.
      folds: in the order of the program.
      fronts: of the normalizations that no layer in front takes in.
      taken: what takes in an op.
      stops: what ends the steps behind a product, by its output.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        norm_of: dict[int, str],
    ):
        self.program, self.names, self.norm_of = program, names, norm_of
        self.walker = Walker(program, names)
        live = program.live(program.outputs)
        self.meetings = [op for op in live if self.statistics(op)]
        self._leaves = collections.defaultdict(set)
        for op in self.meetings:
            for leaf in self.statistics(op):
                self._leaves[norm_of[leaf]].add(leaf)
        self.stops: dict[int, str] = {}
        self._formulas = Formulas(program)
        chains = collections.defaultdict(list)
        for op in live:
            chain = self._chain(op) if op.name in PRODUCTS else None
            if chain:
                chains[chain.leaf].append(chain)
        found = [fold for c in chains.values() for fold in self._folds(c)]
        taken = {step.op for fold in found for step in fold.steps}
        fronts = [self._front(op, taken) for op in live if op.name in PRODUCTS]
        self.fronts = tuple(front for front in fronts if front)
        found += self._own_biases({fold.leaf for fold in found})
        order = {op: i for i, op in enumerate(live)}
        self.folds = tuple(sorted(found, key=lambda f: order[f.product.op]))
        self.taken: dict[Op, Fold | Front] = {}
        places: list[Fold | Front] = [*self.folds, *self.fronts]
        for place in places:
            self.taken |= {step.op: place for step in place.steps}

    def statistics(self, op: Op) -> frozenset[int]:
        """The leaves that an op brings together with the data."""
        return self.program.statistics(op) & self.norm_of.keys()

    def norms(self, leaves: Iterable[int]) -> list[str]:
        return sorted({self.norm_of[leaf] for leaf in leaves})

    def _chain(self, op: Op) -> _Chain | None:
        product = find_product(self.program, op)
        if product is None:
            return None
        steps, stop = self.walker.walk(product)
        seen: set[int] = set()
        ends = []
        for i, step in enumerate(steps):
            seen |= self.statistics(step.op)
            # Half a normalization would be right too, and help nobody.
            if seen and all(self._leaves[n] <= seen for n in self.norms(seen)):
                ends.append(i + 1)
        self.stops[op.outputs[0]] = stop
        if not ends:
            return None
        try:
            leaf, axes = self.walker.kernel(product)
        except Unfoldable as reason:
            self.stops[op.outputs[0]] = str(reason)
            return None
        formula = self._formulas.of(steps)
        return _Chain(product, leaf, axes, tuple(steps), tuple(ends), formula)

    def _folds(self, chains: Sequence[_Chain]) -> list[Fold]:
        """Returns the folds of the products that share a kernel."""
        first = chains[0]
        uses = self.walker.destinations(self.program.leaves[first.leaf])
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
            self.stops[chain.product.op.outputs[0]] = (
                f"follows a layer whose kernel {self.names[first.leaf]!r} is "
                f"also used elsewhere: it goes into {' and '.join(uses)}. One "
                "kernel folds only if the same normalization follows every use"
            )
        return []

    def _front(self, op: Op, taken: set[Op]) -> Front | None:
        """Finds whole normalizations in front of a product.

        taken: the steps that the layer in front of them has taken in.
        """
        product = find_product(self.program, op)
        side = product and input_side(self.program, product)
        if product is None or side is None:
            return None
        seen: set[int] = set()
        steps, end = [], 0
        for step in self.walker.walk_back(side):
            if step.op in taken:
                break
            steps.append(step)
            own = self.statistics(step.op)
            seen |= own
            if own and all(self._leaves[n] <= seen for n in self.norms(seen)):
                end = len(steps)
        if not end:
            return None
        try:
            leaf, axes = self.walker.kernel(side)
            _, output_axes = self.walker.kernel(product)
        except Unfoldable:
            return None
        if len(self.walker.destinations(self.program.leaves[leaf])) > 1:
            return None
        forward = tuple(steps[:end][::-1])
        formula = self._formulas.of(forward)
        return Front(side, leaf, axes, output_axes, product, forward, formula)

    def _own_biases(self, folded: set[int]) -> list[Fold]:
        """Lets the bias of a layer take in what comes from its front."""
        found = []
        for front in self.fronts:
            steps, _ = self.walker.walk(front.output)
            norms = [bool(self.statistics(step.op)) for step in steps]
            end = norms.index(True) if True in norms else len(steps)
            if end and front.leaf not in folded:
                own = tuple(steps[:end])
                formula = self._formulas.of(own)
                found.append(
                    Fold(
                        front.output,
                        front.leaf,
                        front.output_axes,
                        own,
                        formula,
                    )
                )
        return found
