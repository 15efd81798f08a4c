"""Modules of two models matched by name; what does not fit is collected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jaxbn.convert._torch_kinds import KINDS, Name

Rename = Mapping[str, str] | Callable[[str], str] | None
Values = int | Mapping[str, int] | None


def join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def _longest(path: str, keys: Iterable[str], separator: str) -> str | None:
    """The longest of the keys that a path begins with."""
    fit = [
        key
        for key in keys
        if key in ("", path) or path.startswith(key + separator)
    ]
    return max(fit, key=len, default=None)


def new_paths(
    paths: Collection[str],
    rename: Rename,
    separators: tuple[str, str],
    wrong: list[str],
) -> dict[str, str]:
    """Returns old path -> new path of every module."""
    if callable(rename):
        return {path: rename(path) for path in paths}
    found, rename, (old, new) = {}, rename or {}, separators
    for path in paths:
        key = _longest(path, rename, old)
        begin, end = "", path
        if key is not None:
            begin, end = rename[key], path[len(key) :].removeprefix(old)
        found[path] = join(new, begin, end.replace(old, new))
    for key in rename:
        if all(_longest(path, [key], old) is None for path in paths):
            wrong.append(f"rename: no module is {key!r} or below it")
    return found


def kinds_of(
    given: Mapping[str, str] | None,
    modules: Mapping[str, Mapping[Any, np.ndarray]],
    guess: Callable[[Any], str | None],
    wrong: list[str],
) -> dict[str, str]:
    """Returns the kind of every module of which one is known."""
    given = given or {}
    for path, asked in given.items():
        if path not in modules:
            wrong.append(f"kinds: there is no module {path!r}")
        if asked not in KINDS:
            wrong.append(f"kinds: {asked!r} is none of {', '.join(KINDS)}")
    found = {}
    for path, leaves in modules.items():
        kind = given.get(path) or guess(leaves)
        if kind is not None and kind in KINDS:
            found[path] = kind
        elif path not in given:
            shapes = {
                name if isinstance(name, str) else name[1]: list(a.shape)
                for name, a in leaves.items()
            }
            wrong.append(
                f"{path or 'the top level'}: {shapes} may be several kinds; "
                f"give kinds={{{path!r}: ...}}, one of {', '.join(KINDS)}"
            )
    return found


def values_of(
    given: Values,
    modules: Mapping[str, Mapping[Any, np.ndarray]],
    variance: str | Name,
    separator: str,
    wrong: list[str],
) -> dict[str, int]:
    """Returns the values in a batch of every batch norm, unless None."""
    if given is None:
        return {}
    per_path = given if isinstance(given, Mapping) else {"": given}
    found = {}
    for path, leaves in modules.items():
        if variance not in leaves:
            continue
        key = _longest(path, per_path, separator)
        if key is None:
            wrong.append(f"values_per_batch has nothing for {path}")
        elif not per_path[key] >= 2:
            wrong.append(
                f"values_per_batch must be at least 2; got {per_path[key]} "
                f"for {path}"
            )
        else:
            found[path] = per_path[key]
    return found


def compare(
    wanted: Mapping[Any, Any] | None,
    found: Mapping[Any, np.ndarray],
    wrong: list[str],
) -> None:
    if wanted is None:
        return

    def spell(key: str | Name) -> str:
        return key if isinstance(key, str) else "/".join(key)

    for key, value in wanted.items():
        shape = tuple(np.shape(value))
        if key not in found:
            wrong.append(f"missing: {spell(key)} {list(shape)}")
        elif found[key].shape != shape:
            wrong.append(
                f"shape: {spell(key)} is {list(found[key].shape)}, and in like "
                f"{list(shape)}"
            )
    extra = [key for key in found if key not in wanted]
    for key in extra:
        wrong.append(f"unexpected: {spell(key)} {list(found[key].shape)}")
    if extra and wanted.keys() - found.keys():
        wrong.append("Where only names differ, say which is which in rename.")


def raise_all(wrong: list[str]) -> None:
    if wrong:
        raise ValueError("Nothing was converted:\n  " + "\n  ".join(wrong))
