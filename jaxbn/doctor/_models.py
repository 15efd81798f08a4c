"""Models of flax.linen and flax.nnx, as what their examination asks of one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from jaxbn._call import (
    Caller,
    advance_streams,
    caller,
    check_nnx_options,
    infers,
    linen_options,
    run_nnx,
)
from jaxbn._collect import (
    Collected,
    Log,
    Path,
    collect_linen,
    collect_nnx,
    collected,
    with_empty,
)
from jaxbn._moments import Moments
from jaxbn.doctor._outputs import squares

# Groups of devices need devices; the statistics of all are the same.
_WITHOUT_GROUPS: dict[str, Any] = {
    "group_size": None,
    "axis_index_groups": None,
}


class Layers(NamedTuple):
    """What a model has of batch norm, each by path in the order of the calls.

    Attributes:
      trained: options and variables of layers that normalize with the batch.
      inferred: paths of layers in inference mode, although the model trains.
      uncalled: paths of layers that were not called.
      unknown: paths of a mean and var in batch_stats where no batch norm layer
        was called; it may be none.
    """

    trained: dict[str, dict[str, Any]] = {}
    inferred: Sequence[str] = ()
    uncalled: Sequence[str] = ()
    unknown: Sequence[str] = ()


class Parts(NamedTuple):
    """Moments of one layer over the calls of one batch; see `Collected`."""

    values: Moments
    means: Moments
    stds: Moments


class Linen:
    """A linen model as what `examine` asks of one."""

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        call: Caller | None,
        rngs: Any,
        mutable: Collection[str],
    ):
        self._model = model
        self._call = caller(model, call)
        self._variables = variables
        self._given = rngs, mutable
        ours = convert.to_jaxbn(model, **_WITHOUT_GROUPS)

        def read(variables: Any, batch: Any, number: Any) -> Any:
            run = linen_options(variables, rngs, mutable, number=number)
            run["method"] = self._call
            y, found = collect_linen(ours, variables, batch, True, **run)
            # What training creates, such as a cache, inference may do as well.
            if "batch_stats" not in mutable:
                run["mutable"] = [*{*run["mutable"]} - {"batch_stats"}]
            inferred, _ = ours.apply(variables, batch, False, **run)
            parts = {_name(path): _parts(a) for path, a in found.items()}
            return parts, squares(y, inferred)

        self._read = jax.jit(read)

    def layers(self, batch: Any) -> Layers:
        """Returns the layers of the model, from a call that is not run."""
        options: dict[Path, dict[str, Any]] = {}
        modes = Log()
        stats = nn.unbox(self._variables.get("batch_stats", {}))
        # What makes JAX trace anew what it knows already, such as nn.jit.
        seen = with_empty(stats, Log())

        def watch(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer, called = context.module, context.method_name == "__call__"
            kinds = (nn.BatchNorm, jaxbn.linen.BatchNorm)
            if not called or not isinstance(layer, kinds):
                return run(*args, **kwargs)
            running = convert.runs_as(layer)
            if infers(running, *args, **kwargs):
                modes.inferred[layer.path] = None
            else:
                options.setdefault(layer.path, _options(running))
            # Not run: axes that it names are not bound here.
            return _like_output(running, args[0] if args else kwargs["x"])

        def trace(variables: Any, batch: Any) -> Any:
            run = linen_options(variables, *self._given)
            return self._model.apply(
                variables, batch, True, method=self._call, **run
            )

        with nn.intercept_methods(watch):
            jax.eval_shape(
                trace, {**self._variables, "batch_stats": seen}, batch
            )
        known = [path for path, _ in collected(seen)]
        params = self._variables.get("params", {})
        for path, found in options.items():
            if path not in known:
                raise ValueError(
                    f"variables have no running mean and var of {_name(path)}."
                )
            below = _at(stats, path)
            found.update(running_mean=below["mean"], running_var=below["var"])
            found.update(scale=nn.unbox(_at(params, path).get("scale")))
        called = {*options, *modes.inferred}
        return Layers(
            {_name(path): found for path, found in options.items()},
            [_name(path) for path in modes.inferred if path not in options],
            unknown=[_name(path) for path in known if path not in called],
        )

    def read(self, batch: Any, number: int) -> tuple[dict[str, Parts], Any]:
        found: tuple[dict[str, Parts], Any] = self._read(
            self._variables, batch, np.int32(number)
        )
        return found


class Nnx:
    """An nnx model as what `examine` asks of one."""

    def __init__(
        self,
        model: nnx.Module,
        call: Caller | None,
        rngs: Any,
        mutable: Collection[str],
    ):
        run = caller(model, call)
        check_nnx_options(rngs, mutable)
        self._model = model
        self._log = Log()
        ours = convert.to_jaxbn(model, **_WITHOUT_GROUPS)
        graphdef, self._state = nnx.split(ours)

        def read(state: Any, batch: Any, number: Any) -> Any:
            copy: Any = nnx.merge(graphdef, state)
            advance_streams(copy, number)
            output: Any = None
            copy.train()

            def train() -> None:
                nonlocal output
                output = run(copy, batch, True)

            found, self._log = collect_nnx(jaxbn.nnx.batch_norms(copy), train)
            model = nnx.merge(graphdef, state)
            advance_streams(model, number)
            inferred, _ = run_nnx(model, run, batch, False)
            parts = {path: _parts(a) for path, a in found.items()}
            return parts, squares(output, inferred)

        self._read = jax.jit(read)

    def layers(self, batch: Any) -> Layers:
        """Returns the layers of the model, from a call that is not run."""
        layers = jaxbn.nnx.batch_norms(self._model)
        if not layers:
            return Layers()
        # Which fills the log; a fresh function, because it is traced once.
        jax.eval_shape(self._read, self._state, batch, np.int32(0))
        trained = {}
        for (path,) in self._log.trained:
            layer = layers[path]
            trained[path] = _options(layer) | dict(
                running_mean=layer.mean[...],
                running_var=layer.var[...],
                scale=None if layer.scale is None else layer.scale[...],
            )
        inferred = [p for (p,) in self._log.inferred if p not in trained]
        called = {*trained, *inferred}
        return Layers(trained, inferred, [p for p in layers if p not in called])

    def read(self, batch: Any, number: int) -> tuple[dict[str, Parts], Any]:
        found: tuple[dict[str, Parts], Any] = self._read(
            self._state, batch, np.int32(number)
        )
        return found


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


def _like_output(layer: Any, x: Any) -> jax.Array:
    """Returns x in the dtype that the layer would return."""
    x, dtype = jnp.asarray(x), layer.dtype
    if dtype is None:
        affine = layer.use_scale or layer.use_bias
        dtype = np.promote_types(
            x.dtype, layer.param_dtype if affine else x.dtype
        )
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.float32
    y: jax.Array = x.astype(dtype)
    return y


def _parts(found: Collected) -> Parts:
    return Parts(found.values, found.means, found.stds)


def _name(path: Path) -> str:
    return "/".join(path)


def _at(tree: Any, path: Path) -> Mapping[str, Any]:
    for name in path:
        tree = tree.get(name, {})
    below: Mapping[str, Any] = tree
    return below
