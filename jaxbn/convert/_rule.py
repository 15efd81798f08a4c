"""Rules that map flax.linen layers to their replacements."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

import flax.linen as nn

from jaxbn._call_moments import NAME as COLLECTED
from jaxbn._compat.modules import (
    beside,
    detached,
    unwrapped_call,
    with_class,
)
from jaxbn._scope import Scope
from jaxbn.convert import _copies
from jaxbn.convert._checks import refuse, spell_class, subclass_of
from jaxbn.convert._layers import (
    DEFAULTS,
    SHARED,
    fields_of,
    layer_path,
    variables_of,
    written_class,
)
from jaxbn.linen import BatchNorm

# Variables that jaxbn's layer may have.
_VARIABLES = {
    "params": {"scale", "bias"},
    "batch_stats": {"mean", "var", "steps", "skipped", COLLECTED},
}


class StandIn(NamedTuple):
    """The replacement of a layer, and the arguments of its call."""

    cls: type[nn.Module]
    fields: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which layers of a model are replaced, and by what."""

    to: type[nn.Module]
    fields: tuple[tuple[str, Any], ...] = ()  # sorted by name
    keep: frozenset[type | str] = frozenset()
    replace: tuple[tuple[type, Any], ...] = ()  # later ones take precedence
    one_device: bool = False  # removes groups of devices

    def then(self, later: Rule) -> Rule:
        """Returns the rule that applies this one, and then the later one."""
        fields = {**dict(self.fields), **dict(later.fields)}
        replace = {**dict(self.replace), **dict(later.replace)}
        return Rule(
            later.to,
            tuple(sorted(fields.items())),
            self.keep | later.keep,
            tuple(replace.items()),
            self.one_device or later.one_device,
        )

    def changes(self, sharing: Scope) -> dict[str, Any]:
        """Returns the fields to set on a layer with this sharing."""
        fields = dict(self.fields)
        if self.one_device:
            sharing = fields.get("sharing", sharing)
            fields["sharing"] = sharing.without_groups()
            fields["axis_index_groups"] = None
        return fields

    def keeps(self, kind: type, path: str) -> bool:
        return path in self.keep or not self.keep.isdisjoint(kind.__mro__)

    def replacement(self, kind: type) -> Any:
        """Returns the user's replacement of a class, or None."""
        given = dict(self.replace) if self.to is BatchNorm else {}
        return next((given[c] for c in kind.__mro__ if c in given), None)

    def check(self, path: str, fields: dict[str, Any]) -> None:
        """Raises if the new layer cannot have these fields."""
        if self.to is nn.BatchNorm:
            refuse(path, fields, DEFAULTS, SHARED)

    def may_be_copy(self, layer: nn.Module) -> bool:
        """Returns whether a layer must be tried to know its replacement."""
        kind = written_class(layer)
        if self.to is nn.BatchNorm or self.replacement(kind) is not None:
            return False
        if isinstance(layer, (nn.BatchNorm, BatchNorm)):
            return kind is not nn.BatchNorm and not issubclass(kind, BatchNorm)
        return _copies.looks_like_flax(kind)

    def stand_in(
        self, layer: nn.Module, args: Any, kwargs: Any
    ) -> StandIn | str | None:
        """Returns the replacement of a layer.

        A string is the reason why there is none; None if the rule does not
        apply to such layers.
        """
        kind = written_class(layer)
        make = self.replacement(kind)
        if make is not None:
            return self._replaced(layer, make, args, kwargs)
        is_known = isinstance(layer, (nn.BatchNorm, BatchNorm))
        plain = nn.BatchNorm if self.to is BatchNorm else BatchNorm
        if self.may_be_copy(layer) and (args or not is_known):
            found = self._copied(layer, args, kwargs)
            if is_known and isinstance(found, str):
                return f"{subclass_of(plain)}, {found}"
            return found
        if not is_known:
            return None
        if kind is plain or issubclass(kind, self.to):
            cls = self.to if kind is plain else kind
            return self._with_fields(layer, cls, args, kwargs)
        return subclass_of(plain)

    def _with_fields(
        self, layer: nn.Module, cls: type[nn.Module], args: Any, kwargs: Any
    ) -> StandIn:
        fields = self._changed(fields_of(layer, BatchNorm))
        self.check(layer_path(layer), fields)
        known = fields_of(layer, cls)
        fields = {name: fields.get(name, known[name]) for name in known}
        return StandIn(cls, fields, args, kwargs)

    def _copied(
        self, layer: nn.Module, args: Any, kwargs: Any
    ) -> StandIn | str:
        found = _copies.read(layer, args, kwargs)
        if isinstance(found, str):
            return found
        fields = self._changed({**DEFAULTS, **found.fields})
        return StandIn(BatchNorm, fields, found.args, found.kwargs)

    def _replaced(
        self, layer: nn.Module, make: Any, args: Any, kwargs: Any
    ) -> StandIn:
        if make is BatchNorm:
            fields = self._changed(fields_of(layer, BatchNorm))
            return StandIn(BatchNorm, fields, args, kwargs)
        with detached():
            made = make(layer, *args, **kwargs)
        passed: dict[str, Any] = {}
        if isinstance(made, tuple) and len(made) == 2:
            made, passed = made
        if not isinstance(made, BatchNorm) or not isinstance(passed, dict):
            raise ValueError(
                f"{layer_path(layer)}: the rule that replace has for "
                f"{type(layer).__name__} must return a jaxbn.linen.BatchNorm, "
                "or one and a dict of what else to call it with; got "
                f"{type(made).__name__}."
            )
        cls = type(made)
        fields = self._changed(fields_of(made, cls))
        return StandIn(cls, fields, args[:1], passed)

    def _changed(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, **self.changes(fields["sharing"])}


def run(layer: nn.Module, stand_in: StandIn) -> Any:
    """Runs the replacement of a bound layer, on its variables."""
    cls, fields, args, kwargs = stand_in
    kwargs = dict(kwargs)
    known = inspect.signature(unwrapped_call(cls)).parameters
    for name in [name for name in kwargs if name not in known]:
        if kwargs.pop(name) is not None:
            raise ValueError(
                f"{layer_path(layer)} is called with {name}, which "
                f"{spell_class(cls)} does not take."
            )
    kind = written_class(layer)
    if kind in (nn.BatchNorm, BatchNorm) or issubclass(kind, cls):
        twin = with_class(layer, cls, fields)
    else:
        _check_variables(layer, cls)
        twin = beside(layer, cls, fields)
    # The unwrapped method, because flax already intercepts, captures and
    # tabulates this call as that of the layer.
    return unwrapped_call(cls)(twin, *args, **kwargs)


def _check_variables(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Raises if the layer's variables are not those of a BatchNorm."""
    kind = written_class(layer)
    if issubclass(kind, (nn.BatchNorm, BatchNorm)):
        return
    other = [
        f"{collection}/{name}"
        for collection, names in _VARIABLES.items()
        for name in variables_of(layer, collection)
        if name not in names
    ]
    if other:
        raise ValueError(
            f"{layer_path(layer)}: the variables of {spell_class(kind)} are "
            f"named {', '.join(other)}; those of {spell_class(cls)} are mean, "
            "var, scale and bias. Take variables that init of the converted "
            "model returns, or rename these."
        )
