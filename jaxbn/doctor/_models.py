"""A common interface to flax.linen and flax.nnx models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn._call import (
    advance_streams,
    call_nnx_clone,
    check_nnx_options,
    linen_options,
)
from jaxbn._call_moments import Collected, Log, Path, collected, with_empty
from jaxbn._collect_moments import collect_nnx
from jaxbn._convert_to_collect import CollectingLinen, collecting_nnx
from jaxbn._model_call import ModelCall, make_model_call
from jaxbn._passes import Moments
from jaxbn._scope import Scope
from jaxbn.doctor._outputs import squared_norms


class Layers(NamedTuple):
    """The batch norm layers of a model, in the order of the calls.

    Attributes:
      trained: options and variables of layers that normalize with the batch,
        by path.
      inferred: paths of layers in inference mode while the model trains.
      uncalled: paths of layers that were not called.
      unknown: paths in batch_stats with mean and var where no batch norm layer
        was called.
    """

    trained: dict[str, dict[str, Any]] = {}
    inferred: Sequence[str] = ()
    uncalled: Sequence[str] = ()
    unknown: Sequence[str] = ()


class Parts(NamedTuple):
    """Moments of a layer over the calls of one batch; see `Collected`."""

    values: Moments
    means: Moments
    stds: Moments


class LinenModel:
    """A linen model to examine."""

    def __init__(
        self,
        model: nn.Module,
        variables: Any,
        call: ModelCall | None,
        rngs: Any,
        mutable: Collection[str],
    ):
        run = make_model_call(model, call)
        self._variables = variables
        self._linen = CollectingLinen(model)
        self._log = Log()

        def read(variables: Any, batch: Any, number: Any) -> Any:
            options = linen_options(variables, rngs, mutable, number=number)
            options["method"] = run
            y, found, self._log = self._linen.collect(
                variables, batch, **options
            )
            # Inference may also create what training does, such as a cache.
            if "batch_stats" not in mutable:
                options["mutable"].remove("batch_stats")
            inferred, _ = self._linen.infer(variables, batch, **options)
            parts = {_name(path): _parts(a) for path, a in found.items()}
            return parts, squared_norms(y, inferred)

        self._read = jax.jit(read)

    def layers(self, batch: Any) -> Layers:
        """Returns the layers of the model, by tracing a call."""
        # Tracing fills the log; it happens only once.
        jax.eval_shape(self._read, self._variables, batch, np.int32(0))
        stats = nn.unbox(self._variables["batch_stats"])
        params = self._variables.get("params", {})
        trained = {}
        for path in self._log.trained:
            below = _at(stats, path)
            trained[path] = _options(self._linen.layers[path]) | dict(
                running_mean=below["mean"],
                running_var=below["var"],
                scale=nn.unbox(_at(params, path).get("scale")),
            )
        inferred = [path for path in self._log.inferred if path not in trained]
        known = [path for path, _ in collected(with_empty(stats, Log()))]
        called = {*trained, *inferred}
        return Layers(
            {_name(path): found for path, found in trained.items()},
            [_name(path) for path in inferred],
            unknown=[_name(path) for path in known if path not in called],
        )

    def read(self, batch: Any, number: int) -> tuple[dict[str, Parts], Any]:
        found: tuple[dict[str, Parts], Any] = self._read(
            self._variables, batch, np.int32(number)
        )
        return found


class NnxModel:
    """An nnx model to examine."""

    def __init__(
        self,
        model: nnx.Module,
        call: ModelCall | None,
        rngs: Any,
        mutable: Collection[str],
    ):
        run = make_model_call(model, call)
        check_nnx_options(rngs, mutable)
        self._model = model
        self._log = Log()
        self._ours = collecting_nnx(model)
        graphdef, self._state = nnx.split(self._ours)

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
            inferred, _ = call_nnx_clone(model, run, batch, False)
            parts = {path: _parts(a) for path, a in found.items()}
            return parts, squared_norms(output, inferred)

        self._read = jax.jit(read)

    def layers(self, batch: Any) -> Layers:
        """Returns the layers of the model, by tracing a call."""
        # The layers of model itself take precedence over the copies.
        layers = {
            **jaxbn.nnx.batch_norms(self._ours),
            **jaxbn.nnx.batch_norms(self._model),
        }
        # Tracing fills the log; it happens only once.
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
    sharing = getattr(layer, "sharing", Scope())
    per_id = getattr(layer, "per_id", "statistics")
    groups = getattr(layer, "axis_index_groups", None)
    options = {
        "group_size": sharing.group_size,
        "axis_index_groups": groups or sharing.axis_index_groups,
        "normalize_over": sharing.normalize_over,
        "num_ids": None if per_id == "affine" else sharing.num_ids,
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


def _parts(found: Collected) -> Parts:
    return Parts(found.values, found.means, found.stds)


def _name(path: Path) -> str:
    return "/".join(path)


def _at(tree: Any, path: Path) -> Mapping[str, Any]:
    for name in path:
        tree = tree.get(name, {})
    below: Mapping[str, Any] = tree
    return below
