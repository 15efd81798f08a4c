"""Validates the names, types and ranges of config fields."""

from __future__ import annotations

import difflib
from typing import Any

from ml_collections import ConfigDict

from configs import defaults
from configs.ranges import RANGES
from train import UserError

# Options of a layer, which validates their names itself.
_OPEN = "norm_options"


def check_fields(config: ConfigDict) -> None:
    """Raises UserError if a field is unknown, missing or invalid by itself."""
    _check(config, defaults.get_config(), "")


def one_of(key: str, value: str, known: Any) -> None:
    """Raises UserError with a suggestion unless value is known."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0)[0]
        raise UserError(
            f"{key}={value!r} is unknown; did you mean {near!r}? Choose from "
            f"{', '.join(sorted(known))}."
        )


def in_range(name: str, value: float) -> bool:
    """Whether a number is in the range of its field."""
    interval = RANGES[name]
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below  # False for NaN


def _check(config: ConfigDict, known: ConfigDict, prefix: str) -> None:
    for name in config:
        if name not in known and prefix != f"{_OPEN}.":
            near = difflib.get_close_matches(str(name), list(known), 1)
            hint = "configs/defaults.py has all fields."
            if near:
                hint = f"did you mean config.{prefix}{near[0]}?"
            raise UserError(f"There is no config.{prefix}{name}; {hint}")
    for name in known:
        full = prefix + name
        if name not in config:
            raise UserError(
                f"The config has no {full}; configs/defaults.py has all fields."
            )
        value, default = config[name], known[name]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UserError(f"{full} must be a ConfigDict; got {value!r}.")
            _check(value, default, f"{full}.")
        elif isinstance(default, tuple):
            _tuple(full, value, type(default[0]))
        elif value is not None or default is not None:
            _value(full, value, known.get_type(name))


def _tuple(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, tuple):
        raise UserError(f"{name} must be a tuple; got {value!r}.")
    for entry in value:
        _value(name, entry, kind, f"every entry of {name}")


def _value(name: str, value: Any, kind: type, description: str = "") -> None:
    what = description or name
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UserError(
            f"{what} must be of type {kind.__name__}; got {value!r}."
        )
    if kind in (int, float) and not in_range(name, value):
        raise UserError(f"{what} must be in {RANGES[name]}; got {value}.")
