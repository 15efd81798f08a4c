"""Errors of conversion: fields without a counterpart, layers left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn


def refuse(
    path: str,
    fields: Mapping[str, Any],
    defaults: Mapping[str, Any],
    shared: Collection[str],
) -> None:
    """Raises for the first field that flax's layer has no counterpart of."""
    for name, value in fields.items():
        ours = name not in shared and value != defaults[name]
        if ours or (name == "momentum" and value is None):
            raise ValueError(
                f"{path}: flax's BatchNorm has no counterpart of "
                f"{name}={value!r}. Where another value will do, set it first: "
                f"to_flax(to_jaxbn(model, {name}=...))."
            )


def subclass_of(plain: type) -> str:
    return f"a subclass of {spell_class(plain)} that may compute something else"


def refuse_left(left: Mapping[str, tuple[type, str]]) -> None:
    """Raises if layers were left out; left maps paths to (class, reason)."""
    if not left:
        return
    lines = [
        f"  {path} is {spell_class(kind)}, {why}."
        for path, (kind, why) in left.items()
    ]
    names = ", ".join(dict.fromkeys(kind.__name__ for kind, _ in left.values()))
    first = next(iter(left.values()))[0].__name__
    raise ValueError(
        "Conversion would leave these as they are:\n"
        + "\n".join(lines)
        + f"\nGive replace={{{first}: rule}} to to_jaxbn where one is batch "
        f"norm, or keep=[{names}] where it is meant to stay."
    )


def owned_statistics(variables: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of a mean and a variance in variables, or ()."""
    means = [name for name in variables if "mean" in name or name == "mu"]
    spreads = [
        name
        for name in variables
        if any(part in name for part in ("var", "std", "sigma"))
    ]
    return (means[0], spreads[0]) if means and spreads else ()


def spell_class(cls: type) -> str:
    package = "flax." + ("linen" if issubclass(cls, nn.Module) else "nnx")
    module = package if cls.__module__.startswith("flax.") else cls.__module__
    return f"{module}.{cls.__qualname__}"


def spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
