"""A model as a function of named leaves, before and after folding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxbn.fold._chain import Analysis
from jaxbn.fold._rewrite import Rewritten
from jaxbn.fold._trace import Program


class Model:
    """apply on a list of named leaves. Holds no array."""

    def __init__(
        self,
        apply: Callable[..., Any],
        variables: Any,
        is_statistic: Callable[[str], bool] | None,
    ):
        flat, self._treedef = jax.tree_util.tree_flatten_with_path(variables)
        leaves = [leaf for _, leaf in flat]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ValueError(
                "fold computes with the variables; call it outside of jax.jit."
            )
        self._apply = apply
        self._specs = jax.eval_shape(lambda leaves: leaves, leaves)
        self.names = _names([path for path, _ in flat])
        self._norm_of = _norms(self.names, is_statistic)

    def original(self, leaves: Sequence[Any], inputs: Any) -> Any:
        variables = jax.tree.unflatten(self._treedef, leaves)
        return self._apply(variables, *inputs)

    def analyse(
        self, leaves: Sequence[Any], inputs: Any
    ) -> tuple[Analysis, jax.tree_util.PyTreeDef]:
        closed, shapes = jax.make_jaxpr(self.original, return_shape=True)(
            leaves, inputs
        )
        used = [i in self._norm_of for i, _ in enumerate(self.names)]
        analysis = Analysis(Program(closed, used), self.names, self._norm_of)
        return analysis, jax.tree.structure(shapes)

    def folded(self, expected: set[str], signature: Any) -> Callable[..., Any]:
        """Returns (params, *inputs) -> outputs."""

        def folded(params: dict[str, jax.Array], *inputs: Any) -> Any:
            if set(params) != expected:
                raise ValueError(
                    f"params lack {sorted(expected - set(params))} and have "
                    f"{sorted(set(params) - expected)} too much."
                )
            # Once for every shape: the program may depend on it.
            given = [params.get(*pair) for pair in zip(self.names, self._specs)]
            analysis, tree = self.analyse(given, inputs)
            rewritten = Rewritten(analysis)
            if rewritten.signature != signature:
                raise ValueError(
                    "For inputs of these shapes the model is another program, "
                    "which needs other parameters. Call fold with examples of "
                    "these shapes."
                )
            return jax.tree.unflatten(
                tree, rewritten.run(params, jax.tree.leaves(inputs))
            )

        return folded


def _names(paths: Sequence[Any]) -> list[str]:
    """Returns readable names, such as "params/conv/kernel"."""
    value = jax.tree_util.GetAttrKey("value")  # an nnx.Variable's content
    short: Sequence[Any] = [
        p[:-1] if len(p) > 1 and p[-1] == value else p for p in paths
    ]
    if len(set(short)) < len(paths):
        short = paths
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") for path in short
    ]


def _norms(
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
