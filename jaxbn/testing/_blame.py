"""Which layer or array is the first to depend on the split, and why."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax

from jaxbn._compat.jaxprs import bodies, is_literal
from jaxbn._jaxpr import MOVES
from jaxbn.testing._evaluate import ROLES, Array, Split, error


class Blame(NamedTuple):
    """What differs first."""

    what: str
    error: float
    why: str


def blame(
    split: Split,
    got: Sequence[Array],
    wrong: Sequence[tuple[Array, float]],
    rtol: float,
) -> Blame:
    """wrong: the arrays that differ and by how much."""
    axis = split.names if len(split.names) > 1 else split.names[0]
    found = _first_call(split, got, wrong, axis, rtol)
    return found or _first_array(split, got, wrong, axis, rtol)


def _varies(a: Array, rtol: float) -> bool:
    return error(a.copies, a.copies[0]) > rtol


def _why(varying: bool, axis: Hashable) -> str:
    """Explains a difference in statistics."""
    if varying:
        return (
            f"Its statistics are not synchronized over {axis!r}: set "
            f"axis_name={axis!r}."
        )
    return (
        "Its statistics are the same on every device, but not those of the "
        "whole batch. A mean of the devices' means ignores the number of "
        "values on each; or its input already depends on the split."
    )


def _first_call(
    split: Split,
    got: Sequence[Array],
    wrong: Sequence[tuple[Array, float]],
    axis: Hashable,
    rtol: float,
) -> Blame | None:
    """Finds the first linen layer that differs, in order of completion."""
    statistics = [(a, e) for a, e in wrong if _is_statistic(a.path, got)]
    found = None
    for i, call in enumerate(split.calls):
        own = [(a, e) for a, e in statistics if _owns(call.path, a)]
        errors = [e for a, e in wrong if a.call == i] + [e for _, e in own]
        if not errors or (found and not call.inside):
            continue
        varying = any(_varies(a, rtol) for a, _ in own)
        why = "Its result depends on how the batch is split."
        if own:
            why = _why(varying, axis)
        elif call.unbound:
            why = _why(True, axis)
        what = f"layer {call.path!r}" if call.path else "the layer"
        if varying or not found:
            found = Blame(what, max(errors), why)
        # In a loop what is computed first may follow what comes later.
        if varying or not call.inside:
            break
    return found


def _owns(layer: str, a: Array) -> bool:
    """Whether a is a variable of this layer, or of one inside it."""
    inner = a.path.partition("/")[2]  # without its collection
    mine = not layer or inner.startswith(f"{layer}/")
    return mine and a.role == "new variable"


def _first_array(
    split: Split,
    got: Sequence[Array],
    wrong: Sequence[tuple[Array, float]],
    axis: Hashable,
    rtol: float,
) -> Blame:
    """Finds the first result that differs, if no layer is known."""
    place = _places(split, got)
    first, off = min(
        wrong,
        key=lambda pair: (
            # In a loop what is computed first may follow what comes later.
            (
                0,
                place[pair[0].path][:1],
                not _varies(pair[0], rtol),
                place[pair[0].path],
            )
            if pair[0].role == "new variable"
            else (1, not _varies(pair[0], rtol), ROLES.index(pair[0].role))
        ),
    )
    parent, own = _split_path(first.path)
    if first.role == "new variable" and _is_statistic(first.path, got):
        own_wrong = [
            (a, e)
            for a, e in wrong
            if a.role == first.role and _split_path(a.path)[0] == parent
        ]
        why = _why(any(_varies(a, rtol) for a, _ in own_wrong), axis)
        what = f"layer {parent!r}" if parent else str(first)
        return Blame(what, max(e for _, e in own_wrong), why)
    why = "Every device has the same, but not that of the whole batch."
    if _varies(first, rtol):
        why = f"It is not the same on all devices along {axis!r}."
        if first.role == "new variable":
            why += " It may need a mean over that axis."
    elif first.role in ROLES[2:]:
        why = "Outputs agree: a derivative does not reach the other devices."
    return Blame(str(first), off, why)


def _split_path(path: str) -> tuple[str, str]:
    """The layer and the name in it, of a path as flax.nnx or others have."""
    parent, _, own = path.removesuffix("/value").rpartition("/")
    return parent, own


def _is_statistic(path: str, got: Sequence[Array]) -> bool:
    """Whether it is a mean or a variance that lies next to the other one."""
    if path.startswith("batch_stats/"):
        return True
    parent, own = _split_path(path)
    near = [_split_path(a.path) for a in got if a.role == "new variable"]
    names = [name for other, name in near if other == parent]
    return any(
        part in own and any(rest in name for name in names)
        for part, rest in (("mean", "var"), ("var", "mean"))
    )


def _places(split: Split, got: Sequence[Array]) -> dict[str, tuple[int, ...]]:
    """Where in the program each new variable is computed: layers in order."""
    closed = jax.make_jaxpr(lambda *inputs: split(*inputs))(*split.inputs)
    (eqn,) = (e for e in closed.jaxpr.eqns if e.primitive.name == "shard_map")
    (body,) = bodies(eqn)
    return {
        a.path: _place(body, v)
        for a, v in zip(got, body.outvars)
        if a.role == "new variable"
    }


def _place(jaxpr: Any, value: Any) -> tuple[int, ...]:
    made = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    while not is_literal(value) and value in made:
        i = made[value]
        eqn = jaxpr.eqns[i]
        inner = bodies(eqn)
        if eqn.primitive.name in MOVES:
            value = eqn.invars[0]
            continue
        if len(inner) == 1 and len(inner[0].outvars) == len(eqn.outvars):
            result = inner[0].outvars[eqn.outvars.index(value)]
            return (i, *_place(inner[0], result))
        return (i,)
    return ()
