"""Modules of two models matched by name; what does not fit is collected."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.convert._torch_kinds import KINDS, Name, Problems, to_array

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
    problems: Problems,
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
            problems.wrong.append(f"rename: no module is {key!r} or below it")
    return found


def kinds_of(
    given: Mapping[str, str] | None,
    modules: Mapping[str, Mapping[Any, np.ndarray]],
    guess: Callable[[Any], str | None],
    problems: Problems,
) -> dict[str, str]:
    """Returns the kind of every module of which one is known."""
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
    """Returns modules that have no array and are known by their kind."""
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
# Names that a weight has while something computes it, and what ends that.
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
            problems.wrong.append(f"values_per_batch has nothing for {path}")
        elif not per_path[key] >= 2:
            problems.wrong.append(
                f"values_per_batch must be at least 2; got {per_path[key]} "
                f"for {path}"
            )
        else:
            found[path] = per_path[key]
    return found


def fit(
    wanted: Mapping[Any, Any] | None,
    found: dict[Any, np.ndarray],
    skipped: Skipped,
    problems: Problems,
) -> dict[Any, np.ndarray]:
    """Returns what was found, in the shapes and dtypes that are wanted.

    What is skipped or does not fit is taken from what is wanted.
    """
    if wanted is None:
        return found
    fitting: dict[Any, np.ndarray] = {}
    missing = []
    for key, value in wanted.items():
        name, shape = _spell(key), tuple(np.shape(value))
        if key in found and found[key].shape == shape:
            fitting[key] = _as_wanted(name, found[key], value, problems)
            continue
        if _without_collection(key) not in skipped:
            if key not in found:
                missing.append(key)
            problems.unfit.append(
                f"missing: {name} {list(shape)}"
                if key not in found
                else f"shape: {name} is {list(found[key].shape)}, and in like "
                f"{list(shape)}"
            )
            if problems.strict:
                continue
        if type(value).__name__ == "ShapeDtypeStruct":
            problems.wrong.append(
                f"{name} is left out, and like has nothing but its shape; "
                "give variables as like"
            )
            continue
        fitting[key] = np.array(to_array(name, value))
    extra = [
        key
        for key in found
        if key not in wanted and _without_collection(key) not in skipped
    ]
    problems.unfit += [
        f"unexpected: {_spell(key)} {list(found[key].shape)}" for key in extra
    ]
    if extra and missing and problems.strict:
        problems.unfit.append(
            "Where only names differ, say which is which in rename."
        )
    statistics = [
        _without_collection(key).replace("/", ".").rpartition(".")
        for key in (*missing, *extra)
    ]
    untracked = [
        path for path, _, name in statistics if name in ("mean", "running_mean")
    ]
    if untracked and problems.strict:
        problems.unfit.append(
            "A batch norm with track_running_stats=False has no running "
            "statistics in PyTorch; say so in kinds, such as "
            f"{{{untracked[0]!r}: 'batch_norm_untracked'}}."
        )
    return fitting


def _as_wanted(
    name: str, array: np.ndarray, value: Any, problems: Problems
) -> np.ndarray:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return array
    wanted = jnp.dtype(str(dtype).rpartition(".")[2])
    kinds = [
        next(
            kind
            for kind in (jnp.floating, jnp.integer, jnp.generic)
            if jnp.issubdtype(d, kind)
        )
        for d in (array.dtype, wanted)
    ]
    if kinds[0] is not kinds[1]:
        problems.wrong.append(
            f"dtype: {name} is {array.dtype}, and in like {wanted}"
        )
    return array.astype(wanted)


def _without_collection(key: str | Name) -> str:
    return key if isinstance(key, str) else key[1]


def _spell(key: str | Name) -> str:
    return key if isinstance(key, str) else "/".join(key)


class Skipped:
    """Names, with dots or slashes, that begin with one that is skipped."""

    def __init__(self, skip: Iterable[str]):
        given = [skip] if isinstance(skip, str) else skip
        self._names = [name.replace("/", ".") for name in given]

    def __contains__(self, name: str) -> bool:
        name = name.replace("/", ".")
        return _longest(name, self._names, ".") is not None

    def check(self, names: Iterable[str], problems: Problems) -> None:
        """Reports what is skipped and is not there."""
        names = [name.replace("/", ".") for name in names]
        problems.wrong += [
            f"skip: nothing is {given!r} or below it"
            for given in self._names
            if all(_longest(name, [given], ".") is None for name in names)
        ]

    def drop(
        self, modules: dict[str, dict[Any, Any]], renamed: Mapping[str, str]
    ) -> None:
        """Drops modules that are skipped, under their new names as well."""
        for path in [path for path in modules if path and path in self]:
            del modules[path]
            self._names.append(renamed[path].replace("/", "."))
        if not modules.get("", True):
            del modules[""]
