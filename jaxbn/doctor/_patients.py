"""Models of flax.linen and flax.nnx, as what their examination asks of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from jaxbn._moments import Moments

# What a linen model calls the argument that says its mode.
_TRAINING = ("train", "training", "is_training")
_INFERENCE = ("use_running_average", "deterministic", "eval", "inference")

# Groups of devices need devices; the statistics of all are the same.
_WITHOUT_GROUPS: dict[str, Any] = {
    "group_size": None,
    "axis_index_groups": None,
}

Caller = Callable[[Any, Any, bool], Any]


class Linen:
    """A linen model as what `examine` asks of one."""

    def __init__(self, model: nn.Module, variables: Any, call: Caller | None):
        self._model = model
        self._call = call or _caller(model)
        self._variables = variables
        ours = convert.to_jaxbn(model, **_WITHOUT_GROUPS)

        def read(variables: Any, batch: Any) -> Any:
            run: dict[str, Any] = dict(
                method=self._call, rngs={"dropout": jax.random.key(0)}
            )
            moments = jaxbn.linen.batch_moments(
                ours, variables, batch, True, **run
            )
            y, _ = ours.apply(
                variables, batch, True, mutable=["batch_stats"], **run
            )
            inferred = ours.apply(variables, batch, False, **run)
            return _flat(moments), _squares(y, inferred)

        self._read = jax.jit(read)

    def layers(self, batch: Any) -> dict[str, dict[str, Any]]:
        """Options and variables of each layer, in the order of the calls."""
        found: dict[str, dict[str, Any]] = {}

        def watch(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            kinds = (nn.BatchNorm, jaxbn.linen.BatchNorm)
            if isinstance(layer, kinds) and context.method_name == "__call__":
                found["/".join(layer.path)] = _options(convert.runs_as(layer))
                # Not run: axes that it names are not bound here.
                return args[0]
            return run(*args, **kwargs)

        def trace(variables: Any, batch: Any) -> Any:
            return self._model.apply(
                variables,
                batch,
                True,
                method=self._call,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )

        with nn.intercept_methods(watch):
            jax.eval_shape(trace, self._variables, batch)
        stats = self._variables.get("batch_stats", {})
        params = self._variables.get("params", {})
        for path, options in found.items():
            below = _at(stats, path)
            options.update(running_mean=below["mean"], running_var=below["var"])
            options.update(scale=_at(params, path).get("scale"))
        return found

    def read(self, batch: Any) -> Any:
        return self._read(self._variables, batch)


class Nnx:
    """An nnx model as what `examine` asks of one."""

    def __init__(self, model: nnx.Module, call: Caller | None):
        if not isinstance(model, nnx.Module):
            raise ValueError(
                "model must be a flax.linen or flax.nnx module; got "
                f"{type(model).__name__}."
            )
        self._model = model
        self._ours = convert.to_jaxbn(model, **_WITHOUT_GROUPS)

        def run(model: Any, batch: Any, train: bool) -> Any:
            model = nnx.clone(model)
            model.train() if train else model.eval()
            return call(model, batch, train) if call else model(batch)

        class Caller(nnx.Module):
            """So that batch_moments calls the model as asked."""

            def __init__(self, model: nnx.Module):
                self.model = model

            def __call__(self, batch: Any) -> Any:
                if call is None:
                    return self.model(batch)
                return call(self.model, batch, True)

        def read(model: Any, batch: Any) -> Any:
            model = nnx.clone(model)
            model.train()
            moments = jaxbn.nnx.batch_moments(Caller(model), batch)
            moments = {
                path.removeprefix("model").removeprefix("/"): part
                for path, part in moments.items()
            }
            y, inferred = run(model, batch, True), run(model, batch, False)
            return moments, _squares(y, inferred)

        self._read = jax.jit(read)

    def layers(self, batch: Any) -> dict[str, dict[str, Any]]:
        found = {}
        for path, layer in jaxbn.nnx.batch_norms(self._model).items():
            scale = None if layer.scale is None else layer.scale[...]
            found[path] = _options(layer) | dict(
                running_mean=layer.mean[...],
                running_var=layer.var[...],
                scale=scale,
            )
        return found

    def read(self, batch: Any) -> Any:
        return self._read(self._ours, batch)


def _caller(model: nn.Module) -> Caller:
    """Calls the model with the batch and the argument that says its mode."""
    known = inspect.signature(type(model).__call__).parameters
    for names, sign in ((_TRAINING, True), (_INFERENCE, False)):
        for name in names:
            if name in known:
                return lambda model, batch, train: model(
                    batch, **{name: train == sign}
                )
    raise ValueError(
        f"How is {type(model).__name__} put into training mode? None of its "
        f"arguments {', '.join(list(known)[1:])} is one of "
        f"{', '.join(_TRAINING + _INFERENCE)}. Give call, such as "
        "call=lambda model, batch, train: model(batch, mode=train)."
    )


def _options(layer: Any) -> dict[str, Any]:
    scope = getattr(layer, "scope", None)
    options = {
        name: getattr(layer, name, getattr(scope, name, None))
        for name in ("group_size", "axis_index_groups", "normalize_over")
    }
    kind = type(layer).__module__.split(".")[0]
    plain = (nn.BatchNorm, nnx.BatchNorm)
    ours = (jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm)
    return options | dict(
        kind=kind if type(layer) in plain + ours else type(layer).__name__,
        axis_name=layer.axis_name,
        momentum=layer.momentum,
        epsilon=layer.epsilon,
    )


def _squares(trained: Any, inferred: Any) -> tuple[jax.Array, jax.Array]:
    """Squared norms of the difference and of the output in training."""

    def square(tree: Any) -> jax.Array:
        squares = (
            (abs(leaf.astype(float)) ** 2).sum()
            for leaf in jax.tree.leaves(tree)
        )
        return cast("jax.Array", sum(squares))

    return square(jax.tree.map(lambda a, b: a - b, trained, inferred)), square(
        trained
    )


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[str, Moments]:
    if isinstance(tree, Moments):
        return {"/".join(path): tree}
    return {
        name: part
        for key, below in tree.items()
        for name, part in _flat(below, (*path, key)).items()
    }


def _at(tree: Any, path: str) -> Mapping[str, Any]:
    for name in path.split("/") if path else ():
        tree = tree.get(name, {})
    below: Mapping[str, Any] = tree
    return below
