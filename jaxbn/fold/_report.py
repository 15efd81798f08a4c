"""What became of each normalization, and why some are not folded."""

from __future__ import annotations

from typing import NamedTuple

from jaxbn._compat.jaxprs import bodies
from jaxbn._jaxpr import MOVES, is_platform_dependent
from jaxbn.fold._chain import Analysis
from jaxbn.fold._trace import Op
from jaxbn.fold._walk import AFFINE, between, two

_TRAINING = (
    "is in training mode, or never called: its running statistics do not reach "
    "the output. Pass use_running_average=True or train=False, or call eval()"
)


class Layer(NamedTuple):
    """Result of `fold` for one batch normalization.

    Attributes:
      norm: path of its variables.
      kernel: name of the parameter that it was folded into, or None.
      kind: "conv", "grouped conv", "depthwise conv", "transposed conv" or
        "dense"; None if it was not folded.
      reason: why it was not folded; None if it was.
    """

    norm: str
    kernel: str | None
    kind: str | None
    reason: str | None


def report(found: Analysis) -> tuple[Layer, ...]:
    """Returns a Layer for every use of a normalization, or for one in training.

    In the order of the program.
    """
    layers: dict[Layer, None] = {}
    for op in found.meetings:
        place = found.taken.get(op)
        facts: tuple[str | None, str | None, str | None]
        if place:
            facts = (found.names[place.leaf], place.product.kind, None)
        else:
            facts = (None, None, _why(found, op))
        for norm in found.norms(found.statistics(op)):
            layers[Layer(norm, *facts)] = None
    idle = set(found.norm_of.values()) - {layer.norm for layer in layers}
    dead = [norm for norm in sorted(idle) if not _is_uncalled(found, norm)]
    return (*layers, *(Layer(norm, None, None, _TRAINING) for norm in dead))


def _is_uncalled(found: Analysis, norm: str) -> bool:
    """Whether a normalization has scale or bias, and they are unused too."""
    own = [
        found.walker.is_used(value)
        for i, value in enumerate(found.program.leaves)
        if i not in found.norm_of
        and f"/{found.names[i]}".rpartition("/")[0].endswith(f"/{norm}")
    ]
    return bool(own) and not any(own)


def _why(found: Analysis, op: Op) -> str:
    """Returns why what meets the statistics in op is not folded."""
    if is_platform_dependent(op.eqn):
        # jaxbn computes the statistics of a batch, from running ones.
        return _TRAINING
    if bodies(op.eqn):
        return f"lies inside `{op.label}`, whose body is left alone"
    leaves = [found.program.leaves[i] for i in found.statistics(op)]
    rank = min(len(found.program.shape(leaf)) for leaf in leaves)
    value = found.program.data(op)[0]
    if len(found.program.shape(value)) <= rank:
        # Without an axis for examples this is the update of an average.
        return _TRAINING
    if op.name not in AFFINE:
        return f"uses its running statistics in `{op.label}`"
    while value in found.program.producer and value not in found.stops:
        op = found.program.producer[value]
        data = found.program.data(op)
        if len(data) > 1:
            return two(op)
        if op.name not in MOVES | AFFINE:
            return between(op)
        value = data[0]
    return found.stops.get(value, "normalizes an input: no layer precedes it")
