"""What a conversion refuses, and the words for it."""

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
    """Raises for the first field of jaxbn's layer that flax cannot express."""
    for name, value in fields.items():
        ours = name not in shared and value != defaults[name]
        if ours or (name == "momentum" and value is None):
            raise ValueError(
                f"{path}: flax's BatchNorm has no counterpart of "
                f"{name}={value!r}. Where another value will do, set it first: "
                f"to_flax(to_jaxbn(model, {name}=...))."
            )


def own_class(path: str, kind: type, to: type, plain: type) -> str:
    return (
        f"{path} is {spell_class(kind)}, a subclass of {spell_class(plain)} "
        "that may compute something else, so it is not converted. Derive it "
        f"from {spell_class(to)}, or give keep=[{kind.__name__}] to leave it "
        "as it is."
    )


def spell_class(cls: type) -> str:
    package = "flax." + ("linen" if issubclass(cls, nn.Module) else "nnx")
    module = package if cls.__module__.startswith("flax.") else cls.__module__
    return f"{module}.{cls.__qualname__}"


def spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
