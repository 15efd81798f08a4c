"""Turns the findings on all layers into warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxbn.doctor._checks import check_layer
from jaxbn.doctor._finding import Finding
from jaxbn.doctor._health import Health


def warnings(
    layers: Sequence[Health],
    devices: int,
    *,
    others: Mapping[Finding, Sequence[str]],
) -> list[str]:
    """Returns one warning per problem, with its layers and a remedy.

    Args:
      layers: the layers that were examined.
      devices: number of devices that training runs on.
      others: findings on layers that were not examined, with their paths.
    """
    found: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for layer in layers:
        for finding in check_layer(layer, devices):
            entries = found.setdefault(finding[:2], [])
            entries.append((layer.path, finding))
    for finding, paths in others.items():
        for path in paths:
            entries = found.setdefault(finding[:2], [])
            entries.append((path, finding))
    every = [layer.path for layer in layers]
    return [
        f"{_listed([path for path, _ in entries], every)} "
        f"{cause.format(*_ranges([f for _, f in entries]))} {remedy}"
        for (cause, remedy), entries in found.items()
    ]


def _ranges(findings: Sequence[Finding]) -> list[str]:
    """Formats each figure, or its range over the findings."""
    found = []
    for entries in zip(*(finding.figures for finding in findings)):
        least, most = min(entries), max(entries)
        texts = [format(number, form) for number, form in (least, most)]
        found.append(" to ".join(dict.fromkeys(texts)))
    return found


def _listed(paths: Sequence[str], every: Sequence[str]) -> str:
    names = [path or "(the layer)" for path in paths]
    if len(names) > 1 and paths == every:
        return f"Every layer ({len(names)})"
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} more layers: each"
    return ", ".join(names) + (": each" if len(names) > 1 else "")
