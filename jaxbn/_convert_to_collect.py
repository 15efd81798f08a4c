"""Converts models to jaxbn's layers, to collect their moments.

State of other layers is kept: whatever conversion would ask the user about is
not converted, and not collected.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax import nnx

import jaxbn.linen
from jaxbn import convert
from jaxbn._call_moments import Collected, Log, Path
from jaxbn._collect_moments import collect_linen
from jaxbn.convert import _nnx
from jaxbn.convert._checks import owned_statistics
from jaxbn.convert._layers import layer_path, variables_of
from jaxbn.convert._models import on_one_device
from jaxbn.convert._rule import Rule

# Fields that group devices. Collecting runs on global arrays, without groups;
# statistics over all examples are the same.
_GROUPS = ("axis_index_groups", "sharing")


class CollectingLinen:
    """A linen model whose layers return moments.

    Attributes:
      layers: the batch norm layers of the original model by path, available
        after tracing.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._ours = on_one_device(model)
        self.layers: dict[Path, nn.Module] = {}

    def collect(
        self, variables: Any, batch: Any, **options: Any
    ) -> tuple[Any, dict[Path, Collected], Log]:
        """Calls the model in training; see `collect_linen`."""
        left: list[str] = []

        def watch(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            running = layer
            if context.method_name == "__call__":
                running = convert.runs_as(layer, *args, **kwargs)
            if isinstance(running, jaxbn.linen.BatchNorm):
                self.layers.setdefault(
                    layer.path, self._as_given(layer, running)
                )
                return run(*args, **kwargs)
            y = run(*args, **kwargs)
            if owned_statistics(variables_of(layer, "batch_stats")):
                left.append(layer_path(layer))
            return y

        with nn.intercept_methods(watch):
            try:
                return collect_linen(
                    self._ours, variables, batch, True, **options
                )
            except ValueError:
                if not left:
                    raise
        self._ours = on_one_device(self._model, keep=left)
        with nn.intercept_methods(watch):
            return collect_linen(self._ours, variables, batch, True, **options)

    def infer(self, variables: Any, batch: Any, **options: Any) -> Any:
        """Calls the model in inference; returns output and new variables."""
        return self._ours.apply(variables, batch, False, **options)

    def _as_given(self, layer: nn.Module, running: nn.Module) -> nn.Module:
        """Returns the layer with its original groups of devices."""
        kinds = (nn.BatchNorm, jaxbn.linen.BatchNorm)
        rule = vars(type(self._model)).get("_converted_from", (None, None))[1]
        if rule is None:
            given = layer if layer.path else self._model
            # A copy of flax's layer may lack its fields as attributes.
            return given if isinstance(given, kinds) else running
        fields = dict(rule.fields)
        groups: dict[str, Any] = {
            name: fields.get(name, getattr(layer, name, getattr(running, name)))
            for name in _GROUPS
        }
        return running.clone(**groups)


def collecting_nnx(model: Any) -> Any:
    """Returns a copy of an nnx model whose layers return moments."""
    rule = Rule(jaxbn.linen.BatchNorm, one_device=True)
    left = _nnx.exchange(nnx.clone(model, graph=True), rule)
    return on_one_device(model, keep=list(left))
