"""Matches modules of two models by name, and collects mismatches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from jaxbn.convert._torch_kinds import KINDS, Name, Problems

Rename = Mapping[str, str] | Callable[[str], str] | None
Values = int | Mapping[str, int] | None


def join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def longest(path: str, keys: Iterable[str], separator: str) -> str | None:
    """Returns the longest key that is a prefix of path, or None."""
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
    problems: Problems,
) -> dict[str, str]:
    """Returns the new path of each module by its old path."""
    if callable(rename):
        return {path: rename(path) for path in paths}
    found, rename, (old, new) = {}, rename or {}, separators
    for path in paths:
        key = longest(path, rename, old)
        begin, end = "", path
        if key is not None:
            begin, end = rename[key], path[len(key) :].removeprefix(old)
        found[path] = join(new, begin, end.replace(old, new))
    for key in rename:
        if all(longest(path, [key], old) is None for path in paths):
            problems.wrong.append(f"rename: no module is {key!r} or below it")
    return found


def kinds_of(
    given: Mapping[str, str] | None,
    modules: Mapping[str, Mapping[Any, np.ndarray]],
    guess: Callable[[Any], str | None],
    problems: Problems,
) -> dict[str, str]:
    """Returns the kind of each module, where it is known."""
    given = given or {}
    for path, asked in given.items():
        if path not in modules:
            problems.wrong.append(f"kinds: there is no module {path!r}")
        if asked not in KINDS:
            problems.wrong.append(
                f"kinds: {asked!r} is none of {', '.join(KINDS)}"
            )
    found = {}
    computed = {path.rpartition(_PARAMETRIZED)[0] for path in modules} - {""}
    for path, leaves in modules.items():
        kind = given.get(path) or guess(leaves)
        if kind is not None and kind in KINDS:
            found[path] = kind
        elif path not in given and path not in computed:
            problems.unfit.append(_no_kind(path, leaves))
    return found


def without_entries(
    kinds: Mapping[str, str] | None, modules: Collection[str]
) -> dict[str, dict[Any, np.ndarray]]:
    """Returns modules without arrays, which only kinds mentions."""
    return {
        path: {}
        for path, kind in (kinds or {}).items()
        if kind == "batch_norm_untracked" and path not in modules
    }


def _no_kind(path: str, leaves: Mapping[Any, np.ndarray]) -> str:
    where = path or "the top level"
    names = {name if isinstance(name, str) else name[1] for name in leaves}
    owner, parametrized, _ = path.rpartition(_PARAMETRIZED)
    if parametrized:
        return (
            f"{owner}: parametrized; torch.nn.utils.parametrize."
            "remove_parametrizations writes the weight that is in force"
        )
    for marks, what, remedy in _REWRITTEN:
        if marks <= names:
            return f"{where}: {what}; {remedy} writes the weight in force"
    if names == {"n_averaged"}:
        return (
            f"{where}: n_averaged counts the averages of an AveragedModel; "
            f"give skip=[{join('.', path, 'n_averaged')!r}], and "
            f"rename={{{join('.', path, 'module')!r}: {path!r}}} for the rest"
        )
    shapes = {
        name if isinstance(name, str) else name[1]: list(a.shape)
        for name, a in leaves.items()
    }
    return (
        f"{where}: {shapes} may be several kinds; "
        f"give kinds={{{path!r}: ...}}, one of {', '.join(KINDS)}"
    )


_PARAMETRIZED = ".parametrizations."
# Names of a weight that is computed from others, and how to undo that.
_REWRITTEN = (
    (
        {"weight_orig", "weight_mask"},
        "pruned",
        "torch.nn.utils.prune.remove(module, 'weight')",
    ),
    (
        {"weight_orig", "weight_u"},
        "under spectral norm",
        "torch.nn.utils.remove_spectral_norm(module)",
    ),
    (
        {"weight_g", "weight_v"},
        "under weight norm",
        "torch.nn.utils.remove_weight_norm(module)",
    ),
)


def values_of(
    given: Values,
    modules: Mapping[str, Mapping[Any, np.ndarray]],
    variance: str | Name,
    separator: str,
    problems: Problems,
) -> dict[str, int]:
    """Returns the number of values per batch of each batch norm."""
    if given is None:
        return {}
    per_path = given if isinstance(given, Mapping) else {"": given}
    found = {}
    for path, leaves in modules.items():
        if variance not in leaves:
            continue
        key = longest(path, per_path, separator)
        if key is None:
            problems.wrong.append(f"values_per_batch has nothing for {path}")
        elif not per_path[key] >= 2:
            problems.wrong.append(
                f"values_per_batch must be at least 2; got {per_path[key]} "
                f"for {path}"
            )
        else:
            found[path] = per_path[key]
    return found


def flatten(variables: Any, path: tuple[str, ...] = ()) -> dict[Name, Any]:
    """Returns the leaves of params and batch_stats by (collection, path)."""
    found: dict[Name, Any] = {}
    for key, value in variables.items():
        at = (*path, str(key))
        if isinstance(value, Mapping):
            found |= flatten(value, at)
        elif at[0] in ("params", "batch_stats"):
            found[at[0], "/".join(at[1:])] = value
    return found
