"""Groups the options of the layers by what they are for.

A docstring lists them in the order of the signature, under one head.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

_log = logging.getLogger(__name__)

_SHARING = "Which examples share statistics"
_REST = {
    "Running statistics": ("running",),
    "Variants in training": ("renorm", "train_affine"),
    "Inference": ("inference",),
}
# The section that is split, and the options of each group.
_GROUPS = {
    "jaxbn.linen.BatchNorm": (
        "Attributes:",
        {
            "Options shared with flax": (
                "use_running_average",
                "axis_name",
                "momentum",
                "epsilon",
                "dtype",
                "param_dtype",
                "use_bias",
                "use_scale",
                "bias_init",
                "scale_init",
                "axis",
            ),
            _SHARING: ("sharing", "per_id", "axis_index_groups"),
            **_REST,
            "Accepted, without effect": (
                "use_fast_variance",
                "force_float32_reductions",
            ),
        },
    ),
    "jaxbn.nnx.BatchNorm": (
        "Args:",
        {
            "Options shared with flax": ("num_features", "**options"),
            _SHARING: ("sharing", "per_id"),
            **_REST,
        },
    ),
}
# Napoleon has to know them.
HEADS = sorted(
    {
        (head, "params_style")
        for _, groups in _GROUPS.values()
        for head in groups
    }
)


def split(name: str, lines: list[str]) -> list[str]:
    """Returns the docstring of a layer with a section for each group.

    Raises:
      ValueError: an option is in no group, or a group's option is gone.
    """
    section, groups = _GROUPS[name]
    start = lines.index(section) + 1
    end = start
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    entries: dict[str, list[str]] = {}
    for line in lines[start:end]:
        found = re.match(r"\s{2,4}(\S[^:]*):", line)
        indent = len(line) - len(line.lstrip())
        first = len(lines[start]) - len(lines[start].lstrip())
        if found and indent == first:
            entries[found[1]] = []
        entries[list(entries)[-1]].append(line)
    grouped = [option for group in groups.values() for option in group]
    if sorted(grouped) != sorted(entries):
        differ = sorted(set(grouped) ^ set(entries))
        raise ValueError(f"option_groups.py and {name} differ in {differ}.")
    parts = [
        [f"{head}:", *(line for key in options for line in entries[key]), ""]
        for head, options in groups.items()
    ]
    return [
        *lines[: start - 1],
        *(line for part in parts for line in part),
        *lines[end:],
    ]


def _regroup(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "class" and name in _GROUPS:
        try:
            lines[:] = split(name, lines)
        except ValueError as error:
            _log.warning("%s", error)


def setup(app: Sphinx) -> dict[str, Any]:
    # Before markup is escaped and napoleon reads the sections.
    app.connect("autodoc-process-docstring", _regroup, priority=395)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
