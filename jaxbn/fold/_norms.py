"""Which of the variables are running statistics of a normalization."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from jaxbn.fold._trace import PRODUCTS, Program
from jaxbn.fold._walk import AFFINE


def find_norms(
    names: Sequence[str], is_statistic: Callable[[str], bool] | None
) -> dict[int, str]:
    """Returns the normalization that each running statistic belongs to."""
    if is_statistic is None:
        is_statistic = _default_rule(names)
    found = {}
    for i, name in enumerate(names):
        if is_statistic(name):
            parent = name.rpartition("/")[0]
            found[i] = parent.removeprefix("batch_stats").strip("/") or "."
    if not found:
        raise ValueError(
            "variables hold no running statistics: nothing below a top-level "
            '"batch_stats", and no mean and var next to each other. Tell them '
            "by is_statistic=lambda path: ...; the paths are such as "
            f"{list(names[:3])}."
        )
    return found


def _default_rule(names: Sequence[str]) -> Callable[[str], bool]:
    if any(name.startswith("batch_stats/") for name in names):
        return lambda name: name.startswith("batch_stats/")
    split = [name.rpartition("/") for name in names]
    means = {parent for parent, _, own in split if own == "mean"}
    both = means & {parent for parent, _, own in split if own == "var"}

    def is_mean_or_var(name: str) -> bool:
        parent, _, own = name.rpartition("/")
        return own in ("mean", "var") and parent in both

    return is_mean_or_var


def without_foreign(
    program: Program, names: Sequence[str], norm_of: dict[int, str]
) -> dict[int, str]:
    """Leaves out state that only lies next to running statistics.

    Such as what spectral normalization keeps, which goes into a kernel, and
    counters. What stays has two arrays that are alike, a mean and a variance by
    any name, or scales or shifts the data.
    """
    leaves = collections.defaultdict(set)
    for leaf, norm in norm_of.items():
        leaves[norm].add(leaf)
    scaling: set[int] = set()
    kernels: set[int] = set()
    others: set[int] = set()
    for op in program.live(program.outputs):
        into = kernels if op.name in PRODUCTS else others
        into |= program.statistics(op)
        if op.name in AFFINE:
            scaling |= program.statistics(op)

    def sizes(leaves: set[int]) -> list[tuple[int, ...]]:
        values = [program.leaves[leaf] for leaf in leaves]
        shapes = [program.shape(v) for v in values if program.is_real(v)]
        return [shape for shape in shapes if shape]

    def is_norm(own: set[int]) -> bool:
        if own & kernels and not own & others:
            return False
        alike = len(set(sizes(own))) < len(sizes(own))
        return alike or bool(sizes(own & scaling))

    norms = {norm for norm, own in leaves.items() if is_norm(own)}
    return {leaf: norm for leaf, norm in norm_of.items() if norm in norms}
