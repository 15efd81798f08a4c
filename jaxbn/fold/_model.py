"""A model as a function of named leaves, before and after folding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxbn._compat import (
    is_traced,
    is_weakly_typed,
    tracing_settings,
    varying_axes,
)
from jaxbn.fold._chain import Analysis
from jaxbn.fold._norms import find_norms, without_foreign
from jaxbn.fold._rewrite import Rewritten
from jaxbn.fold._trace import Program


class Traced(NamedTuple):
    """What a model computes from inputs of some shapes."""

    analysis: Analysis
    outputs: Any  # the structure of the result


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
        if any(map(is_traced, leaves)):
            raise ValueError(
                "fold computes with the variables; call it outside of jax.jit."
            )
        self._apply = apply
        self.specs = jax.eval_shape(lambda leaves: leaves, leaves)
        self.names = _names([path for path, _ in flat])
        self._is_guess = is_statistic is None
        self._norm_of = find_norms(self.names, is_statistic)

    def original(self, leaves: Sequence[Any], inputs: Any) -> Any:
        variables = jax.tree.unflatten(self._treedef, leaves)
        return self._apply(variables, *inputs)

    def trace(self, leaves: Sequence[Any], inputs: Any) -> Traced:
        closed, shapes = jax.make_jaxpr(self.original, return_shape=True)(
            leaves, inputs
        )
        used = [i in self._norm_of for i, _ in enumerate(self.names)]
        program, norm_of = Program(closed, used), self._norm_of
        if self._is_guess:
            norm_of = without_foreign(program, self.names, norm_of)
        analysis = Analysis(program, self.names, norm_of)
        return Traced(analysis, jax.tree.structure(shapes))


class FoldedModel:
    """(params, *inputs) -> outputs.

    Attributes:
      inputs: shapes and dtypes of the inputs that it was made for.
    """

    def __init__(
        self, model: Model, params: Any, rewritten: Rewritten, inputs: Any
    ):
        self._model, self._signature = model, rewritten.signature
        # A folded bias may have the name, not the type, of one that is gone.
        self._given = rewritten.taken
        self.inputs = jax.eval_shape(lambda inputs: inputs, inputs)
        self._params = {name: _kind(leaf) for name, leaf in params.items()}
        self._known: dict[Any, tuple[Rewritten, Any]] = {}

    def keep(self, inputs: Any, traced: Traced) -> None:
        """Runs this program, and not the model, for inputs of these shapes."""
        self._known[_key(inputs)] = (self._checked(traced), traced.outputs)

    def __call__(self, params: dict[str, jax.Array], *inputs: Any) -> Any:
        if params.keys() != self._params.keys():
            lacking = sorted(self._params.keys() - params.keys())
            surplus = sorted(params.keys() - self._params.keys())
            raise ValueError(
                f"params lack {lacking} and have {surplus} too much."
            )
        same = {name: _kind(leaf) for name, leaf in params.items()}
        found = self._known.get(_key(inputs)) if same == self._params else None
        # A program traced here has no axes to vary or to shard over.
        if found is None or not _is_plain((params, inputs)):
            model = self._model
            given = [
                params[name] if name in self._given else spec
                for name, spec in zip(model.names, model.specs)
            ]
            traced = model.trace(given, inputs)
            found = self._checked(traced), traced.outputs
        rewritten, outputs = found
        return jax.tree.unflatten(
            outputs, rewritten.run(params, jax.tree.leaves(inputs))
        )

    def _checked(self, traced: Traced) -> Rewritten:
        rewritten = Rewritten(traced.analysis)
        if rewritten.signature != self._signature:
            raise ValueError(
                "For inputs of these shapes the model is another program, "
                "which needs other parameters. Call fold with examples of "
                "these shapes."
            )
        return rewritten


def _kind(x: Any) -> tuple[Any, ...]:
    aval = jax.typeof(x)
    return (aval.shape, aval.dtype, is_weakly_typed(aval))


def _key(inputs: Any) -> Any:
    """Inputs and settings that a model is traced alike for."""
    leaves, structure = jax.tree.flatten(inputs)
    return structure, tuple(map(_kind, leaves)), tracing_settings()


def _is_plain(tree: Any) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.AxisType.Explicit not in mesh.axis_types and not any(
        map(varying_axes, jax.tree.leaves(tree))
    )


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
