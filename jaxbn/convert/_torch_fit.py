"""Matches arrays with those of another model, and leaves some out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.convert._torch_kinds import Name, Problems, to_array
from jaxbn.convert._torch_names import longest


def fit(
    wanted: Mapping[Any, Any] | None,
    found: dict[Any, np.ndarray],
    skipped: Skipped,
    problems: Problems,
) -> dict[Any, np.ndarray]:
    """Returns the arrays that were found, with the names and dtypes wanted.

    Arrays that are skipped or do not match have the wanted values.
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
            if key in found:
                problems.unfit.append(
                    f"shape: {name} is {list(found[key].shape)}, and in like "
                    f"{list(shape)}"
                )
            else:
                missing.append(key)
                problems.unfit.append(f"missing: {name} {list(shape)}")
            if problems.strict:
                continue
        if isinstance(value, jax.ShapeDtypeStruct):
            problems.wrong.append(
                f"{name} is left out, and like has nothing but its shape; "
                "give variables as like"
            )
        else:
            fitting[key] = np.array(to_array(name, value))
    extra = [
        key
        for key in found
        if key not in wanted and _without_collection(key) not in skipped
    ]
    problems.unfit += [
        f"unexpected: {_spell(key)} {list(found[key].shape)}" for key in extra
    ]
    if problems.strict:
        problems.unfit += _hints(missing, extra)
    return fitting


def _hints(missing: list[Any], extra: list[Any]) -> list[str]:
    hints = []
    if extra and missing:
        hints.append("Where only names differ, say which is which in rename.")
    for key in (*missing, *extra):
        name = _without_collection(key).replace("/", ".")
        path, _, leaf = name.rpartition(".")
        if leaf in ("mean", "running_mean"):
            return [
                *hints,
                "A batch norm with track_running_stats=False has no running "
                "statistics in PyTorch; say so in kinds, such as "
                f"{{{path!r}: 'batch_norm_untracked'}}.",
            ]
    return hints


def _as_wanted(
    name: str, array: np.ndarray, value: Any, problems: Problems
) -> np.ndarray:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return array
    wanted = jnp.dtype(str(dtype).rpartition(".")[2])  # torch.float16 as well
    are_floats = {
        bool(jnp.issubdtype(d, jnp.floating)) for d in (array.dtype, wanted)
    }
    if len(are_floats) > 1:
        problems.wrong.append(
            f"dtype: {name} is {array.dtype}, and in like {wanted}"
        )
        return array
    return array.astype(wanted)


def _without_collection(key: str | Name) -> str:
    return key if isinstance(key, str) else key[1]


def _spell(key: str | Name) -> str:
    return key if isinstance(key, str) else "/".join(key)


class Skipped:
    """Skipped paths, with dots or slashes, and everything below them."""

    def __init__(self, skip: Iterable[str]):
        given = [skip] if isinstance(skip, str) else skip
        self._names = [name.replace("/", ".") for name in given]

    def __contains__(self, name: str) -> bool:
        name = name.replace("/", ".")
        return longest(name, self._names, ".") is not None

    def check(self, names: Iterable[str], problems: Problems) -> None:
        """Reports skipped paths that do not exist."""
        names = [name.replace("/", ".") for name in names]
        problems.wrong += [
            f"skip: nothing is {given!r} or below it"
            for given in self._names
            if all(longest(name, [given], ".") is None for name in names)
        ]

    def drop(
        self, modules: dict[str, dict[Any, Any]], renamed: Mapping[str, str]
    ) -> None:
        """Drops skipped modules, and skips their new names too."""
        for path, leaves in list(modules.items()):
            if not leaves:
                del modules[path]
            if path in self and renamed[path]:
                self._names.append(renamed[path].replace("/", "."))
